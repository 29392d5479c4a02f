// The 3x3 convolution by Winograd's minimal filtering; fastdiff/ops/conv3x3.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

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

// The transforms of one line, in place: elements `step` apart. Value has +, - and
// fma(float, Value, Value).
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
};

}  // namespace fd
