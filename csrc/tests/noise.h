// Standard normals in float64, one at a time, from the words of the scalar Philox.
#pragma once

#include <cmath>

#include "../randn.h"

namespace fd {

inline void normals64(uint32_t r0, uint32_t r1, double z[2]) {
  const float u = static_cast<float>(r0) * 0x1p-32f + 0x1p-33f;
  const double length = std::sqrt(-2 * std::log(static_cast<double>(u)));
  const double angle = r1 * (2 * M_PI * 0x1p-32);
  z[0] = length * std::cos(angle);
  z[1] = length * std::sin(angle);
}

inline uint32_t word(const int64_t* stream, uint32_t row, int64_t element) {
  const auto block = philox<uint64_t>(stream_of(stream, row), element / 4);
  return static_cast<uint32_t>(block.word[element % 4]);
}

inline double normal64(const int64_t* stream, uint32_t row, int64_t element) {
  double z[2];
  const int64_t pair = element - element % 2;
  normals64(word(stream, row, pair), word(stream, row, pair + 1), z);
  return z[element % 2];
}

}  // namespace fd
