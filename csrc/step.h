// One row of a sampler's table; fastdiff/ops/step.py states the formula.
#pragma once

#include "exponential.h"
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

// As torch.clamp: NaN stays NaN.
FD_HOST_DEVICE float clamp(float x, float limit) {
  const float low = x < -limit ? -limit : x;
  return low > limit ? limit : low;
}

// The formula's terms, in their order.
FD_HOST_DEVICE float guided(const Row& k, float m, float m_u) {
  return FD_FMA(k.w_1, m - m_u, m_u);
}

FD_HOST_DEVICE float predicted(const Row& k, float x, float m) {
  return clamp(FD_FMA(k.px, x, k.pm * m), k.clip);
}

FD_HOST_DEVICE float with_classifier(const Row& k, float D, float r, float g) {
  return FD_FMA(k.q * (r * r), g, D);
}

FD_HOST_DEVICE float next_state(const Row& k, float x, float D, float m) {
  return FD_FMA(k.a, x, FD_FMA(k.b, D, k.n * m));
}

FD_HOST_DEVICE float with_history(const Row& k, float x_next, float h) {
  return FD_FMA(k.c, h, x_next);
}

FD_HOST_DEVICE float with_noise(const Row& k, float x_next, float r, float z) {
  return FD_FMA(k.s * r, z, x_next);
}

FD_HOST_DEVICE float next_history(const Row& k, float x, float D) {
  return FD_FMA(k.d, x, k.e * D);
}

template <unsigned has>
FD_HOST_DEVICE StepOutput step_element(const Row& k, const StepInput& in) {
  const float m = has & kGuided ? guided(k, in.m, in.m_u) : in.m;
  const float r = has & kLearned ? exponential(k.l * in.v) : 1.0f;
  float D = predicted(k, in.x, m);
  if (has & kClassifier) D = with_classifier(k, D, r, in.g);
  float x = next_state(k, in.x, D, m);
  if (has & kHistory) x = with_history(k, x, in.h);
  if (has & kNoise) x = with_noise(k, x, r, in.z);
  return {x, next_history(k, in.x, D)};
}

}  // namespace fd
