// One row of a sampler's table; fastdiff/ops/step.py states the formula.
#pragma once

#include "randn.h"

namespace fd {

struct Step {
  Size size;
  const float* table;  // [rows, kColumns]
  int64_t rows;
  const int64_t* row;
  const int64_t* streams;  // [samples, 2], or null
  int64_t copies;          // of model_input, one batch apart
  Operand x, m, m_u, v, g, h, z, x_next, h_next, model_input;
};

// COLUMNS of fastdiff/table.py.
enum Column { kT, kCIn, kW, kPx, kPm, kClip, kQ, kA, kB, kC, kN, kS, kL, kD, kE, kColumns };

// Which operands take part: constants of the compiled loop.
constexpr unsigned kGuided = 1, kLearned = 2, kClassifier = 4, kHistory = 8, kNoise = 16;
constexpr unsigned kHasAll = 31;

struct Row {
  float w_1, px, pm, clip, q, a, b, c, n, s, l, d, e;
  float c_in;  // of the next row
};

FD_HOST_DEVICE Row row_of(const float* table, int64_t rows, int64_t row) {
  const float* k = table + row * kColumns;
  const float* next = table + (row + 1 < rows ? row + 1 : row) * kColumns;
  return {k[kW] + 1.0f, k[kPx], k[kPm], k[kClip], k[kQ], k[kA], k[kB],
          k[kC],        k[kN],  k[kS],  k[kL],    k[kD], k[kE], next[kCIn]};
}

struct StepInput {
  float x, m, m_u, v, g, h, z;
};

struct StepOutput {
  float x, h;
};

// e^x by 2^n e^f, |f| <= ln(2) / 2: 3e-9 relative, then the rounding. NaN stays NaN.
FD_HOST_DEVICE float exponential(float x) {
  const float bounded = x > 90.0f ? 90.0f : x < -105.0f ? -105.0f : x;
  const float shifted = FD_FMA(bounded, 1.44269504f, 0x1.8p23f);  // its low bits hold n
  const float n = shifted - 0x1.8p23f;
  const float f = FD_FMA(n, -3.19461850e-05f, FD_FMA(n, -0.693115234f, bounded));  // x - n ln 2
  const float tail = polynomial(f, 0.49999994f, 0.166665211f, 0.0416682623f, 0.00836866908f,
                                0.00138210237f);
  const float value = FD_FMA(f * f, tail, f) + 1.0f;
  // Two factors, since 2^n alone can overflow or be subnormal where the result is not.
  const uint32_t power = bits_of(shifted) - bits_of(0x1.8p23f);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(power) >> 1);
  return value * float_of((half + 127u) << 23) * float_of((power - half + 127u) << 23);
}

// As torch.clamp: NaN stays NaN.
FD_HOST_DEVICE float clamp(float x, float limit) {
  const float low = x < -limit ? -limit : x;
  return low > limit ? limit : low;
}

template <unsigned has>
FD_HOST_DEVICE StepOutput step_element(const Row& k, const StepInput& in) {
  const float m = has & kGuided ? FD_FMA(k.w_1, in.m - in.m_u, in.m_u) : in.m;
  const float r = has & kLearned ? exponential(k.l * in.v) : 1.0f;
  float D = clamp(FD_FMA(k.px, in.x, k.pm * m), k.clip);
  if (has & kClassifier) D = FD_FMA(k.q * (r * r), in.g, D);
  float x = FD_FMA(k.a, in.x, FD_FMA(k.b, D, k.n * m));
  if (has & kHistory) x = FD_FMA(k.c, in.h, x);
  if (has & kNoise) x = FD_FMA(k.s * r, in.z, x);
  return {x, FD_FMA(k.d, in.x, k.e * D)};
}

}  // namespace fd
