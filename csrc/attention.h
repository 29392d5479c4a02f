// Scaled dot-product attention; fastdiff/ops/attention.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

// Strides: batch, head, token, -. The elements of a token's head are adjacent.
struct Attention {
  int64_t batch, heads, queries, keys, size;
  float scale;
  Operand q, k, v, out;
  float* lse = nullptr;  // [batch, heads, queries], where it is asked for
};

// Its gradients: of.out and of.lse are what it gave.
struct AttentionBackward {
  Attention of;
  Operand grad, grad_q, grad_k, grad_v;
};

constexpr int64_t kMostHeadSize = 512, kHeadSizeStep = 8;

}  // namespace fd
