// Vectors of 64-bit words, as wide as the instruction set this file is compiled for.
#pragma once

#include "../tensor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fd {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
constexpr int kParts = 4;  // side by side: of one, each round would wait for the round before
constexpr int kLanes = kParts * kWidth;

typedef uint64_t Part __attribute__((vector_size(8 * kWidth)));

struct Lanes {
  Part part[kParts];

  Lanes() = default;
  FD_MEMBER explicit Lanes(uint64_t value) {
    for (Part& p : part) p = Part{} + value;
  }
};

FD_HOST_DEVICE Lanes operator^(Lanes a, const Lanes& b) {
  for (int k = 0; k < kParts; ++k) a.part[k] ^= b.part[k];
  return a;
}

FD_HOST_DEVICE Lanes operator^(Lanes a, uint32_t b) {
  for (Part& p : a.part) p ^= static_cast<uint64_t>(b);
  return a;
}

FD_HOST_DEVICE Lanes operator>>(Lanes a, int bits) {
  for (Part& p : a.part) p >>= bits;
  return a;
}

// A compiler makes three products, or a slow one of 64 by 64 bits, of the plain expression.
FD_HOST_DEVICE Lanes product(Lanes a, uint32_t b) {
  const Part factor = Part{} + static_cast<uint64_t>(b);
  for (Part& p : a.part) {
#if defined(__AVX512F__)
    p = (Part)_mm512_maskz_mul_epu32(0xff, (__m512i)p, (__m512i)factor);
#elif defined(__AVX2__)
    p = (Part)_mm256_mul_epu32((__m256i)p, (__m256i)factor);
#elif defined(__x86_64__)
    p = (Part)_mm_mul_epu32((__m128i)p, (__m128i)factor);
#else
    p = (p & 0xffffffffu) * factor;
#endif
  }
  return a;
}

}  // namespace
}  // namespace fd
