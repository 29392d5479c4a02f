// The gradients of group_norm_silu; fastdiff/ops/group_norm_silu_backward.py states the formulas.
#pragma once

#include "group_norm_silu.h"

namespace fd {

// The gradient of x goes to `of.out`; x, grad and it walk alike. The gradients of parameters have
// the parameters' kinds of strides, and are absent where they are not asked for.
struct GroupNormSiluBackward {
  GroupNormSilu of;
  Operand grad, grad_weight, grad_bias, grad_scale, grad_shift;
};

// SiLU's derivative at y. Here 1 - s = e s: the difference would be off by half a unit of 1.
FD_HOST_DEVICE float silu_slope(float y) {
  const float bounded = y < -87.0f ? -87.0f : y;  // an infinite e would make e s NaN
  const float e = exponential(-bounded), s = 1.0f / (1.0f + e);
  return s * FD_FMA(bounded, e * s, 1.0f);
}

// x's gradient is a dy + constant + slope d, at a distance d = x - center from about the mean.
struct Gradient {
  float constant, slope;
};

// Of a group with the means of gain dy and of gain dy n.
FD_HOST_DEVICE Gradient gradient_of(const Normal& group, float center, double first,
                                    double second) {
  const double slope = group.scale * group.scale * second;
  return {static_cast<float>(slope * (group.mean - center) - group.scale * first),
          static_cast<float>(-slope)};
}

}  // namespace fd
