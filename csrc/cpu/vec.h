// Sixteen floats, and how they come from and go to memory: AVX-512 only.
#pragma once

#include <immintrin.h>

#include "../tensor.h"

// A function that needs the bfloat16 instructions, which not every AVX-512 machine has.
#define FD_BF16 __attribute__((target("avx512bf16")))

namespace fd {
namespace {

constexpr int kVec = 16;

struct Vec {
  __m512 v;
};

FD_HOST_DEVICE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FD_HOST_DEVICE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FD_HOST_DEVICE Vec operator*(float a, Vec b) { return {_mm512_mul_ps(_mm512_set1_ps(a), b.v)}; }
FD_HOST_DEVICE Vec fma(float a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(_mm512_set1_ps(a), b.v, c.v)};
}

FD_HOST_DEVICE Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
FD_HOST_DEVICE void store(float* to, Vec a) { _mm512_storeu_ps(to, a.v); }

FD_HOST_DEVICE Vec load(const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

// To bfloat16, rounded as to_bf16 does, but that subnormal numbers become zero.
FD_BF16 FD_HOST_DEVICE void store(uint16_t* to, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(a.v));
}

// Neighbours of a sum that stand side by side, as the dot product's instruction takes them.
template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

// Two neighbours of a sum, of 16 columns each: rows of `width` elements in float32, and pairs in
// bfloat16.
FD_HOST_DEVICE void store_pair(float* to, int64_t width, Vec even, Vec odd) {
  store(to, even);
  store(to + width, odd);
}

FD_BF16 FD_HOST_DEVICE void store_pair(uint16_t* to, int64_t, Vec even, Vec odd) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16((__m512i)order, both));
}

// Lane j of v[i] and lane i of v[j] change places: blocks of 8, then of 4, 2 and 1, across the
// diagonal.
FD_HOST_DEVICE void transpose(Vec* v) {
  typedef int Lanes __attribute__((vector_size(64)));
  const Lanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  FD_UNROLL(4)
  for (int side = 8; side >= 1; side /= 2) {
    const Lanes right = (lane & side) != 0;
    const __m512i upper = (__m512i)(right ? lane - side + kVec : lane);
    const __m512i lower = (__m512i)(right ? lane + kVec : lane + side);
    FD_UNROLL(16)
    for (int i = 0; i < kVec; ++i) {
      if (i & side) continue;
      const __m512 a = v[i].v, b = v[i + side].v;
      v[i].v = _mm512_permutex2var_ps(a, upper, b);
      v[i + side].v = _mm512_permutex2var_ps(a, lower, b);
    }
  }
}

}  // namespace
}  // namespace fd
