// Sixteen floats, and how they come from and go to memory: one vector of AVX-512, or two of AVX2.
#pragma once

#include <immintrin.h>

#include "../tensor.h"

// A function that needs the bfloat16 instructions, which not every AVX-512 machine has.
#if defined(__AVX512F__) && !defined(FD_EMULATED)
#define FD_BF16 __attribute__((target("avx512bf16")))
#else
#define FD_BF16
#endif

namespace fd {
namespace {

constexpr int kVec = 16;

// Neighbours of a sum that stand side by side, as the dot product's instruction takes them.
template <class T>
constexpr int kPair = sizeof(T) == 2 ? 2 : 1;

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
};

FD_HOST_DEVICE Vec zeros() { return {_mm512_setzero_ps()}; }
FD_HOST_DEVICE Vec every(float a) { return {_mm512_set1_ps(a)}; }
FD_HOST_DEVICE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FD_HOST_DEVICE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FD_HOST_DEVICE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FD_HOST_DEVICE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

FD_HOST_DEVICE Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
FD_HOST_DEVICE void store(float* to, Vec a) { _mm512_storeu_ps(to, a.v); }

// The first `count` of them, the others 0.
template <int count>
FD_MEMBER Vec load_first(const float* from) {
  return {_mm512_maskz_loadu_ps((1 << count) - 1, from)};
}

template <int count>
FD_MEMBER void store_first(float* to, Vec a) {
  _mm512_mask_storeu_ps(to, (1 << count) - 1, a.v);
}

FD_HOST_DEVICE Vec load(const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

// To bfloat16, rounded as to_bf16 does, but that subnormal numbers become zero.
FD_BF16 FD_HOST_DEVICE void store(uint16_t* to, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(a.v));
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

#else

struct Vec {
  __m256 low, high;
};

FD_HOST_DEVICE Vec zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FD_HOST_DEVICE Vec every(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
FD_HOST_DEVICE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
FD_HOST_DEVICE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
FD_HOST_DEVICE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
FD_HOST_DEVICE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

FD_HOST_DEVICE Vec load(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
FD_HOST_DEVICE void store(float* to, Vec a) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}

// All bits of the first `count` lanes.
template <int count>
FD_MEMBER __m256i first_of_eight() {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// The first `count` of them, the others 0.
template <int count>
FD_MEMBER Vec load_first(const float* from) {
  return {_mm256_maskload_ps(from, first_of_eight<count>()),
          _mm256_maskload_ps(from + 8, first_of_eight<count - 8>())};
}

template <int count>
FD_MEMBER void store_first(float* to, Vec a) {
  float lanes[kVec];
  store(lanes, a);
  memcpy(to, lanes, sizeof(float) * count);  // some processors take tens of cycles for a mask
}

// Lanes across the diagonal of eight vectors: blocks of 4, then of 2 and 1.
FD_HOST_DEVICE void transpose_eight(__m256* const* v) {
  FD_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    const __m256 a = *v[i], b = *v[i + 4];
    *v[i] = _mm256_permute2f128_ps(a, b, 0x20);
    *v[i + 4] = _mm256_permute2f128_ps(a, b, 0x31);
  }
  FD_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    if (i & 2) continue;
    const __m256d a = _mm256_castps_pd(*v[i]), b = _mm256_castps_pd(*v[i + 2]);
    *v[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
    *v[i + 2] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  }
  FD_UNROLL(8)
  for (int i = 0; i < 8; i += 2) {
    const __m256 a = *v[i], b = *v[i + 1];
    *v[i] = _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa);
    *v[i + 1] = _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa);
  }
}

// Lane j of v[i] and lane i of v[j] change places.
FD_HOST_DEVICE void transpose(Vec* v) {
  FD_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    const __m256 right = v[i].high;
    v[i].high = v[i + 8].low;
    v[i + 8].low = right;
  }
  for (Vec* half : {v, v + 8}) {
    __m256 *low[8], *high[8];
    for (int i = 0; i < 8; ++i) low[i] = &half[i].low, high[i] = &half[i].high;
    transpose_eight(low);
    transpose_eight(high);
  }
}

#endif

FD_HOST_DEVICE Vec operator*(float a, Vec b) { return every(a) * b; }
FD_HOST_DEVICE Vec fma(float a, Vec b, Vec c) { return fma(every(a), b, c); }

// Two neighbours of a sum, of 16 columns each: rows of `width` elements in float32, and pairs in
// bfloat16.
FD_HOST_DEVICE void store_pair(float* to, int64_t width, Vec even, Vec odd) {
  store(to, even);
  store(to + width, odd);
}

}  // namespace
}  // namespace fd
