// What attention_backward does with blocks in registers, beside attention's own: AVX-512 only.
#pragma once

#include "attention_block.h"

namespace fd {
namespace {

constexpr float kToBase2 = 1.44269504f;

FD_HOST_DEVICE __m512 floats(const float* from, __mmask16 here) {
  return _mm512_maskz_loadu_ps(here, from);
}

FD_HOST_DEVICE __m512 floats(const uint16_t* from, __mmask16 here) {
  const __m256i halves = _mm256_maskz_loadu_epi16(here, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <class T>
inline float dot(const T* a, const T* b, int64_t size) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kVec) {
    const __mmask16 here = first_lanes(size - i);
    sum = _mm512_fmadd_ps(floats(a + i, here), floats(b + i, here), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// Of a key, or in bfloat16 of two, and a block of queries: the weights p = 2^(scale s - lse) and
// ds = p (dp - d) as rows `line` apart, and ds once more as the keys' rows of panels of 32 queries.
struct Softmax {
  float scale;
  const float *lse, *d;
  int64_t line, panel;

  template <int degree>
  FD_MEMBER __m512 weights(const float* s, int64_t i) const {
    return power_of_2<degree>(_mm512_fmsub_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(s + i),
                                              _mm512_loadu_ps(lse + i)));
  }

  FD_MEMBER __m512 slopes(__m512 p, const float* dp, int64_t i) const {
    return _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(dp + i), _mm512_loadu_ps(d + i)));
  }

  void operator()(const float* s, const float* dp, int64_t count, float* p, float* ds,
                  float* packed) const {
    for (int64_t i = 0; i < count; i += kVec) {
      const __m512 w = weights<5>(s, i);
      const __m512 slope = slopes(w, dp, i);
      _mm512_storeu_ps(p + i, w);
      _mm512_storeu_ps(ds + i, slope);
      _mm512_storeu_ps(packed + i / kKeyPanel * panel + i % kKeyPanel, slope);
    }
  }

  FD_BF16 void operator()(const float* s, const float* dp, int64_t count, uint16_t* p,
                          uint16_t* ds, uint16_t* packed) const {
    const __m512i half =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(half, _mm512_set1_epi32(0x10001)),
                                           _mm512_set1_epi32(16 << 16));  // 0, 16, 1, 17, ...
    for (int64_t i = 0; i < count; i += kVec) {
      const __m512 w[2] = {weights<3>(s, i), weights<3>(s + line, i)};
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(slopes(w[1], dp + line, i),
                                                        slopes(w[0], dp, i));
      const __m512i ws = (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]);
      const auto to = [&](uint16_t* at) { return reinterpret_cast<__m256i*>(at + i); };
      _mm256_storeu_si256(to(p), _mm512_castsi512_si256(ws));
      _mm256_storeu_si256(to(p + line), _mm512_extracti64x4_epi64(ws, 1));
      _mm256_storeu_si256(to(ds), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(to(ds + line), _mm512_extracti64x4_epi64(both, 1));
      _mm512_storeu_si512(packed + i / kKeyPanel * panel + i % kKeyPanel * 2,
                          _mm512_permutexvar_epi16(order, both));
    }
  }
};

// [keys][size] to [size][keys], `line` apart, zero where there is no key up to a whole vector.
template <class T>
inline void turn(const T* from, int64_t stride, int64_t keys, int64_t size, T* to, int64_t line) {
  constexpr int64_t kUnit = 4 / sizeof(T);
  for (int64_t key = 0; key < keys; key += kVec * kUnit)
    for (int64_t c = 0; c < size; c += kVec) {
      __m512i x[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t k = key + i * kUnit;
        const T* row = from + k * stride + c;
        x[i] = k < keys ? values(row, k + 1 < keys ? row + stride : nullptr, first_lanes(size - c))
                        : _mm512_setzero_si512();
      }
      transpose(x);
      for (int i = 0; i < 16 && c + i < size; ++i)
        _mm512_storeu_si512(to + (c + i) * line + key, x[i]);
    }
}

// [size][line] to rows of `size`, times scale.
template <class T>
inline void store_turned(const float* from, int64_t line, int64_t count, int64_t size, float scale,
                         T* to, int64_t stride) {
  for (int64_t row = 0; row < count; row += kVec)
    for (int64_t c = 0; c < size; c += kVec) {
      __m512i x[16];
      float tile[kVec];
      for (int i = 0; i < 16; ++i)
        x[i] = c + i < size ? _mm512_loadu_si512(from + (c + i) * line + row)
                            : _mm512_setzero_si512();
      transpose(x);
      for (int i = 0; i < 16 && row + i < count; ++i) {
        _mm512_storeu_si512(tile, x[i]);
        store_row(tile, scale, std::min<int64_t>(size - c, kVec), to + (row + i) * stride + c);
      }
    }
}

}  // namespace
}  // namespace fd
