// e^x and SiLU in float32: what the vector loops can have of them.
#pragma once

#include "tensor.h"

namespace fd {

// c[0] + c[1] x + c[2] x^2 + ...
FD_HOST_DEVICE float polynomial(float, float constant) { return constant; }
template <class... Rest>
FD_HOST_DEVICE float polynomial(float x, float constant, Rest... rest) {
  return FD_FMA(polynomial(x, rest...), x, constant);
}

// e^x by 2^n e^f, |f| <= ln(2) / 2: 3e-9 relative, then the rounding. NaN stays NaN.
FD_HOST_DEVICE float exponential(float x) {
  const float bounded = x > 90.0f ? 90.0f : x < -105.0f ? -105.0f : x;
  const float shifted = FD_FMA(bounded, 1.44269504f, 0x1.8p23f);  // its low bits hold n
  const float n = shifted - 0x1.8p23f;
  const float f = FD_FMA(n, -3.19461850e-05f, FD_FMA(n, -0.693115234f, bounded));  // x - n ln 2
  const float tail = polynomial(f, 0.49999994f, 0.166665211f, 0.0416682623f, 0.00836866908f,
                                0.00138210237f);
  const float value = FD_FMA(f * f, tail, f) + 1.0f;
  // Two factors, since 2^n alone can overflow or be subnormal where the result is not.
  const uint32_t power = bits_of(shifted) - bits_of(0x1.8p23f);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(power) >> 1);
  return value * float_of((half + 127u) << 23) * float_of((power - half + 127u) << 23);
}

// x / (1 + e^-x).
FD_HOST_DEVICE float silu(float x) { return x / (1.0f + exponential(-x)); }

}  // namespace fd
