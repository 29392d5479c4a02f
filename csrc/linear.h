// Rows times a matrix, with bias and residual; fastdiff/ops/linear.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

struct Linear {
  int64_t samples, rows, inputs, outputs;  // `rows` of each sample
  DType dtype;                             // of all but the bias: f32 or bf16
  const void* weight;       // [outputs / 32][inputs][32], bf16: [outputs / 32][inputs / 2][32][2]
  const float* bias;        // [outputs], or absent
  Operand x, residual, out;  // strides of sample and row; the elements of a row are adjacent
};

}  // namespace fd
