// The training loss and its gradient; fastdiff/ops/weighted_mse.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

struct WeightedMse {
  Size size;
  const int64_t* t;      // [samples]
  const float* weights;  // [times]
  int64_t times;
  float* losses;  // [samples]
  float* sums;    // [times, 3]
  Operand output, target;
};

struct WeightedMseBackward {
  Size size;
  const int64_t* t;      // [samples]
  const float* weights;  // [times]
  const float* grad;     // [samples]
  double scale;          // 2 / elements of a sample
  Operand output, target, grad_output, grad_target;
};

// Exact, and so are sums of many to float32.
FD_HOST_DEVICE double squared_error(float output, float target) {
  const double difference = static_cast<double>(output) - target;
  return difference * difference;
}

FD_HOST_DEVICE float weighted_mse_slope(double scale, float weight, float grad) {
  return static_cast<float>(scale * weight * grad);
}

}  // namespace fd
