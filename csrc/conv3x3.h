// The 3x3 convolution by Winograd's minimal filtering; fastdiff/ops/conv3x3.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

constexpr int kTaps = 9;

struct Conv3x3 {
  int64_t samples, height, width, outputs;  // of the output, [samples, outputs, height, width]
  int64_t inputs;                           // channels of x
  int64_t tile;                             // 2 or 4: outputs of a tile along a side
  bool upsample;                            // x is half as high and wide: each pixel twice
  DType dtype;                              // of all but the bias: f32 or bf16
  const void* weight;  // [outputs / 32][(tile + 2)^2][inputs][32], bf16: [inputs / 2][32][2]
  const float* bias;
  int64_t bias_stride;          // from sample to sample: 0 if all have the same
  Operand x, residual, out;     // strides of sample, channel (1), row and column
};

// A weight, transformed and in the order that Conv3x3 reads.
struct PackConv3x3 {
  int64_t outputs, inputs;  // of the convolution that it is for
  int64_t tile;
  bool turned;              // by half a turn: the taps in reverse order
  DType dtype;              // of out: f32 or bf16
  const float* weight;
  int64_t stride[3];        // of weight: outputs, inputs and the nine taps
  void* out;
};

// The gradient of a weight: sums over all the tiles of x and of the result's gradient.
struct Conv3x3WeightGradient {
  int64_t samples, height, width, outputs, inputs;
  int64_t tile;
  DType dtype;      // of x and grad: f32 or bf16
  float* out;       // [outputs][inputs][9]
  Operand x, grad;  // strides of sample, channel (1), row and column
};

// The transforms of one line, in place: elements `step` apart. Value has +, - and
// fma(float, Value, Value). input is B^T, filter G, output A^T; gradient is A and taps G^T.
template <int tile>
struct Winograd;

// F(2, 3): points 0, 1, -1 and infinity.
template <>
struct Winograd<2> {
  template <class Value>
  static FD_MEMBER void input(Value* d, int step) {
    Value &d0 = d[0], &d1 = d[step], &d2 = d[2 * step], &d3 = d[3 * step];
    const Value sum = d1 + d2, difference = d2 - d1;
    d0 = d0 - d2;
    d3 = d3 - d1;
    d1 = sum;
    d2 = difference;
  }

  template <class Value>
  static FD_MEMBER void output(Value* m, int step) {
    Value &m0 = m[0], &m1 = m[step], &m2 = m[2 * step], &m3 = m[3 * step];
    m0 = m0 + m1 + m2;
    m1 = m1 - m2 + m3;
  }

  template <class Value>
  static FD_MEMBER void filter(Value* g, int step) {
    Value &g0 = g[0], &g1 = g[step], &g2 = g[2 * step];
    const Value even = 0.5f * (g0 + g2), odd = 0.5f * g1;
    g[3 * step] = g2;
    g1 = even + odd;
    g2 = even - odd;
  }

  template <class Value>
  static FD_MEMBER void gradient(Value* y, int step) {
    const Value y0 = y[0], y1 = y[step];
    y[step] = y0 + y1;
    y[2 * step] = y0 - y1;
    y[3 * step] = y1;
  }

  template <class Value>
  static FD_MEMBER void taps(Value* u, int step) {
    Value &u0 = u[0], &u1 = u[step], &u2 = u[2 * step], &u3 = u[3 * step];
    const Value even = 0.5f * (u1 + u2), odd = 0.5f * (u1 - u2);
    u0 = u0 + even;
    u1 = odd;
    u2 = even + u3;
  }
};

// F(4, 3): points 0, +-p, +-q and infinity, with p = 1/sqrt 2 and q = sqrt 2.
template <>
struct Winograd<4> {
  static constexpr float p = 0.70710678118654752f, q = 1.41421356237309505f;

  template <class Value>
  static FD_MEMBER void input(Value* d, int step) {
    Value &d0 = d[0], &d1 = d[step], &d2 = d[2 * step];
    Value &d3 = d[3 * step], &d4 = d[4 * step], &d5 = d[5 * step];
    const Value even_p = fma(-2.0f, d2, d4), odd_p = fma(-2.0f, d1, d3);
    const Value even_q = fma(-0.5f, d2, d4), odd_q = fma(-0.5f, d1, d3);
    d0 = fma(-2.5f, d2, d0 + d4);
    d5 = fma(-2.5f, d3, d1 + d5);
    d1 = fma(p, odd_p, even_p);
    d2 = fma(-p, odd_p, even_p);
    d3 = fma(q, odd_q, even_q);
    d4 = fma(-q, odd_q, even_q);
  }

  template <class Value>
  static FD_MEMBER void output(Value* m, int step) {
    Value &m0 = m[0], &m1 = m[step], &m2 = m[2 * step];
    Value &m3 = m[3 * step], &m4 = m[4 * step], &m5 = m[5 * step];
    const Value sum_p = m1 + m2, difference_p = m1 - m2;
    const Value sum_q = m3 + m4, difference_q = m3 - m4;
    m0 = m0 + sum_p + sum_q;
    m1 = p * difference_p + q * difference_q;
    m2 = fma(0.5f, sum_p, sum_q + sum_q);
    m3 = fma(p / 2, difference_p, fma(2 * q, difference_q, m5));
  }

  template <class Value>
  static FD_MEMBER void filter(Value* g, int step) {
    Value &g1 = g[step], &g2 = g[2 * step];
    const Value g0 = g[0], last = g2;
    const Value even_p = fma(-2.0f / 3, g0, (-1.0f / 3) * last), odd_p = (-2 * p / 3) * g1;
    const Value even_q = fma(1.0f / 6, g0, (1.0f / 3) * last), odd_q = (q / 6) * g1;
    g1 = even_p + odd_p;
    g2 = even_p - odd_p;
    g[3 * step] = even_q + odd_q;
    g[4 * step] = even_q - odd_q;
    g[5 * step] = last;
  }

  template <class Value>
  static FD_MEMBER void gradient(Value* y, int step) {
    const Value y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    const Value even_p = fma(0.5f, y2, y0), odd_p = p * fma(0.5f, y3, y1);
    const Value even_q = fma(2.0f, y2, y0), odd_q = q * fma(2.0f, y3, y1);
    y[step] = even_p + odd_p;
    y[2 * step] = even_p - odd_p;
    y[3 * step] = even_q + odd_q;
    y[4 * step] = even_q - odd_q;
    y[5 * step] = y3;
  }

  template <class Value>
  static FD_MEMBER void taps(Value* u, int step) {
    Value &u0 = u[0], &u1 = u[step], &u2 = u[2 * step];
    const Value u3 = u[3 * step], u4 = u[4 * step], u5 = u[5 * step];
    const Value sum_p = u1 + u2, difference_p = u1 - u2, sum_q = u3 + u4, difference_q = u3 - u4;
    u0 = fma(-2.0f / 3, sum_p, fma(1.0f / 6, sum_q, u0));
    u1 = fma(-2 * p / 3, difference_p, (q / 6) * difference_q);
    u2 = fma(1.0f / 3, sum_q - sum_p, u5);
  }
};

}  // namespace fd
