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

struct NoisingRow {
  float alpha, sigma, tx, tz;
};

struct NoisingOutput {
  float x_t, target;
};

FD_HOST_DEVICE NoisingRow noising_row(const float* table, int64_t t) {
  const float* k = table + 4 * t;
  return {k[0], k[1], k[2], k[3]};
}

FD_HOST_DEVICE NoisingOutput noising_element(const NoisingRow& k, float x0, float z) {
  return {FD_FMA(k.alpha, x0, k.sigma * z), FD_FMA(k.tx, x0, k.tz * z)};
}

}  // namespace fd
