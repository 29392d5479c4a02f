// Group normalisation, an affine map and SiLU; fastdiff/ops/group_norm_silu.py states the formula.
#pragma once

#include "exponential.h"

namespace fd {

// Strides: of x and out (sample, channel, pixel, -), where channels or pixels are adjacent, the
// same in both; of weight and bias (-, channel); of scale and shift (sample, channel).
struct GroupNormSilu {
  int64_t samples, channels, pixels, groups;
  float eps;
  bool silu;
  Operand x, weight, bias, scale, shift, out;
};

struct Normal {
  double mean, scale;  // scale: 1 / sqrt(variance + eps)
};

// Of `count` numbers with this sum and sum of squares.
FD_HOST_DEVICE Normal normal_of(double count, double sum, double square, float eps) {
  const double mean = sum / count, variance = square / count - mean * mean;
  const double positive = variance < 0 ? 0 : variance;  // NaN stays NaN
  return {mean, 1.0 / __builtin_sqrt(positive + eps)};
}

// Adds `count` numbers of which the sums of x - shift and of its square are given: with a shift
// that is about their mean, nothing is lost in float32.
FD_HOST_DEVICE void add_shifted(double& sums, double& squares, double count, float shift, float sum,
                                float square) {
  const double from = shift, part = sum, whole = count * from;
  sums += part + whole;
  squares += square + from * (part + part + whole);
}

// What a channel's elements go through: a x + b.
struct Affine {
  float a, b;
};

// b is what a as rounded asks for, in double: a mean can be much larger than what is left of x.
FD_HOST_DEVICE Affine affine_of(const Normal& group, float weight, float bias, float scale,
                                float shift) {
  const double gain = 1.0 + scale;
  const float a = static_cast<float>(group.scale * weight * gain);
  return {a, static_cast<float>(bias * gain + shift - a * group.mean)};
}

template <bool with_silu>
FD_HOST_DEVICE float group_norm_silu_element(float a, float b, float x) {
  const float y = FD_FMA(a, x, b);
  return with_silu ? silu(y) : y;
}

}  // namespace fd
