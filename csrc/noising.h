// The forward process and the training target; fastdiff/ops/noising.py states the formula.
#pragma once

#include "randn.h"

namespace fd {

struct Noising {
  Size size;
  const int64_t* t;    // [samples]
  const float* table;  // [rows, 4]: alpha, sigma, tx, tz
  int64_t rows;
  const int64_t* streams;  // [samples, 2], or null
  uint32_t row;            // of the noise
  Operand x0, noise, x_t, target;
};

struct NoisingOutput {
  float x_t, target;
};

FD_HOST_DEVICE NoisingOutput noising_element(const float* k, float x0, float z) {
  return {FD_FMA(k[0], x0, k[1] * z), FD_FMA(k[2], x0, k[3] * z)};
}

}  // namespace fd
