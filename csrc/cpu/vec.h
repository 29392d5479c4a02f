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

}  // namespace
}  // namespace fd
