// Scaled dot-product attention; fastdiff/ops/attention.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

// Strides: batch, head, token, -. The elements of a token's head are adjacent.
struct Attention {
  int64_t batch, heads, queries, keys, size;
  float scale;
  Operand q, k, v, out;
};

constexpr int64_t kMostHeadSize = 512, kHeadSizeStep = 8;

}  // namespace fd
