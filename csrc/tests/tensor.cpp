// The conversions of 16-bit floats against rounding in float64.
#include "../tensor.h"

#include <cmath>

#include "check.h"

namespace {

// Nearest with `digits` binary digits, none below 2^lowest, ties to even; infinity beyond `most`.
double rounded(double x, int digits, int lowest, double most) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int last = std::max(exponent - digits, lowest);
  const double value = std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
  return std::abs(value) > most ? std::copysign(INFINITY, value) : value;
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

}  // namespace

void test_tensor() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t narrow = static_cast<uint16_t>(bits);
    const float half = fd::from_f16(narrow), brain = fd::from_bf16(narrow);
    const double magnitude = (bits & 0x7fff) < 0x400
                                 ? std::ldexp(bits & 0x3ff, -24)
                                 : std::ldexp((bits & 0x3ff) | 0x400, (bits >> 10 & 31) - 25);
    if ((bits & 0x7c00) != 0x7c00)
      CHECK(same(half, bits & 0x8000 ? -magnitude : magnitude), "%04x: %g", bits, half);
    else
      CHECK(bits & 0x3ff ? std::isnan(half) : std::isinf(half), "%04x: %g", bits, half);
    CHECK(std::isnan(half) || fd::to_f16(half) == narrow, "%04x", bits);
    CHECK(std::isnan(brain) || fd::to_bf16(brain) == narrow, "%04x", bits);
  }
  uint32_t bits = 1;
  for (int i = 0; i < 2000000; ++i) {
    bits = bits * 1664525u + 1013904223u;
    // Ties and their neighbours as often as others.
    const uint32_t tried = i % 4 ? bits : (bits & 0xffffe000u) + 0x1000u + i / 4 % 3 - 1;
    const float x = fd::float_of(tried);
    const double f16 = fd::from_f16(fd::to_f16(x)), bf16 = fd::from_bf16(fd::to_bf16(x));
    CHECK(same(f16, rounded(x, 11, -24, 65504)), "f16 of %a: %a", x, f16);
    CHECK(same(bf16, rounded(x, 8, -133, 0x1.fep127)), "bf16 of %a: %a", x, bf16);
  }
}
