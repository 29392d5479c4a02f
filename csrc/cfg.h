// Classifier-free guidance; fastdiff/ops/cfg.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

struct Cfg {
  Size size;
  const float* weights;  // [samples], or null: w for all
  float w;
  Operand m_cond, m_uncond, out;
};

FD_HOST_DEVICE float cfg_element(float w_1, float cond, float uncond) {
  return FD_FMA(w_1, cond - uncond, uncond);
}

}  // namespace fd
