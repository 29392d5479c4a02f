// What attention does with eight queries and a block of keys, in registers: AVX-512 only.
//
// Memory is seen in units of 32 bits: a float, or two neighbouring bfloat16 whose products with two
// others one instruction adds up. So both dtypes are laid out by the same code.
#pragma once

#include <cmath>

#include "power.h"

namespace fd {
namespace {

constexpr int kKeyPanel = 32;

FD_HOST_DEVICE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kVec ? 0xffff : (1u << count) - 1);
}

FD_HOST_DEVICE __m512i unit_at(const void* from) {
  int32_t unit;
  memcpy(&unit, from, sizeof unit);
  return _mm512_set1_epi32(unit);
}

// c = sum, or scale[row] c + sum where there is a scale.
template <int vectors>
FD_HOST_DEVICE void put(const __m512 (&sum)[8][vectors], float* c, int64_t stride,
                        const float* scale) {
  FD_UNROLL(8)
  for (int r = 0; r < 8; ++r)
    for (int n = 0; n < vectors; ++n) {
      float* to = c + r * stride + n * kVec;
      const __m512 s = sum[r][n];
      _mm512_storeu_ps(to, scale ? _mm512_fmadd_ps(_mm512_set1_ps(scale[r]), _mm512_loadu_ps(to), s)
                                 : s);
    }
}

// Terms of a product in float32 that are summed before their sum joins the whole: the rounding
// error grows with the length of a sum.
constexpr int64_t kTerms = 64;
constexpr float kOnes[8] = {1, 1, 1, 1, 1, 1, 1, 1};

// c[8][16 vectors] = a[8][depth] b, to which scale[row] c is added where there is a scale. b is
// packed: [depth][columns], or for bfloat16 [depth / 2][columns][2].
template <int vectors>
FD_NOINLINE void multiply(const float* a, int64_t stride, const float* b, int64_t depth, float* c,
                          int64_t c_stride, const float* scale) {
  for (int64_t first = 0; first < depth; first += kTerms, scale = kOnes) {
    const int64_t end = first + kTerms < depth ? first + kTerms : depth;
    __m512 sum[8][vectors];
    for (auto& row : sum)
      for (auto& s : row) s = _mm512_setzero_ps();
    for (int64_t k = first; k < end; ++k) {
      __m512 right[vectors];
      for (int n = 0; n < vectors; ++n)
        right[n] = _mm512_loadu_ps(b + (k * vectors + n) * kVec);
      FD_UNROLL(8)
      for (int r = 0; r < 8; ++r) {
        const __m512 left = _mm512_castsi512_ps(unit_at(a + r * stride + k));
        for (int n = 0; n < vectors; ++n) sum[r][n] = _mm512_fmadd_ps(left, right[n], sum[r][n]);
      }
    }
    put(sum, c, c_stride, scale);
  }
}

template <int vectors>
FD_BF16 FD_NOINLINE void multiply(const uint16_t* a, int64_t stride, const uint16_t* b,
                                  int64_t depth, float* c, int64_t c_stride, const float* scale) {
  __m512 sum[8][vectors];
  for (auto& row : sum)
    for (auto& s : row) s = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh right[vectors];
    for (int n = 0; n < vectors; ++n)
      right[n] = (__m512bh)_mm512_loadu_si512(b + (k * vectors + 2 * n) * kVec);
    FD_UNROLL(8)
    for (int r = 0; r < 8; ++r) {
      const __m512bh left = (__m512bh)unit_at(a + r * stride + k);
      for (int n = 0; n < vectors; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], left, right[n]);
    }
  }
  put(sum, c, c_stride, scale);
}

inline float exponential_of_2(float x) {
  return _mm512_cvtss_f32(power_of_2<5>(_mm512_set1_ps(x)));
}

// Of those that are numbers: a NaN shows in the sum of the exponentials.
inline float largest_of(const float* x, int64_t count) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < count; i += kVec) {
    most = _mm512_mask_max_ps(most, first_lanes(count - i), _mm512_loadu_ps(x + i), most);
  }
  return _mm512_reduce_max_ps(most);
}

// weights[i] = 2^(scale (x[i] - most)), and 0 after the last up to a whole vector; gives their sum.
// Where weights are rounded to bfloat16, degree 3 is enough, unless the sum is to be kept.
template <int degree>
inline float exponentials(const float* x, int64_t count, float scale, float most, float* weights) {
  __m512 sum = _mm512_setzero_ps();
  const __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(most);
  for (int64_t i = 0; i < count; i += kVec) {
    const __m512 w = _mm512_maskz_mov_ps(
        first_lanes(count - i),
        power_of_2<degree>(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), less), by)));
    sum = _mm512_add_ps(sum, w);
    _mm512_storeu_ps(weights + i, w);
  }
  return _mm512_reduce_add_ps(sum);
}

template <int degree>
FD_BF16 inline float exponentials(const float* x, int64_t count, float scale, float most,
                                  uint16_t* weights) {
  __m512 sum = _mm512_setzero_ps();
  const __m512 by = _mm512_set1_ps(scale), less = _mm512_set1_ps(most);
  for (int64_t i = 0; i < count; i += kVec) {
    const __m512 w = _mm512_maskz_mov_ps(
        first_lanes(count - i),
        power_of_2<degree>(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), less), by)));
    sum = _mm512_add_ps(sum, w);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i), (__m256i)_mm512_cvtneps_pbh(w));
  }
  return _mm512_reduce_add_ps(sum);
}

inline void store_row(const float* x, float scale, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kVec)
    _mm512_mask_storeu_ps(to + i, first_lanes(count - i),
                          _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(x + i)));
}

FD_BF16 inline void store_row(const float* x, float scale, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += kVec)
    _mm256_mask_storeu_epi16(
        to + i, first_lanes(count - i),
        (__m256i)_mm512_cvtneps_pbh(
            _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(x + i))));
}

// Rows and columns of 16 by 16 units change places.
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  // x[4 i + j] holds, in its lane l, column 4 l + j of rows 4 i to 4 i + 3
  for (int j = 0; j < 4; ++j) {
    y[j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88);
    y[4 + j] = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    y[8 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    y[12 + j] = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
    x[8 + j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd);
    x[4 + j] = _mm512_shuffle_i32x4(y[4 + j], y[12 + j], 0x88);
    x[12 + j] = _mm512_shuffle_i32x4(y[4 + j], y[12 + j], 0xdd);
  }
}

// [keys][size] to panels of 32 keys: [size][32] units each, zero where there is no key.
template <class T>
inline void pack_keys(const T* from, int64_t stride, int64_t keys, int64_t size, T* to) {
  constexpr int64_t kUnit = 4 / sizeof(T);
  const int64_t depth = size / kUnit;
  for (int64_t key = 0; key < keys; key += kVec) {
    T* panel = to + key / kKeyPanel * kKeyPanel * size + key % kKeyPanel * kUnit;
    for (int64_t d = 0; d < depth; d += 16) {
      const __mmask16 here = first_lanes(depth - d);
      __m512i x[16];
      for (int i = 0; i < 16; ++i)
        x[i] = key + i < keys
                   ? _mm512_maskz_loadu_epi32(here, from + (key + i) * stride + d * kUnit)
                   : _mm512_setzero_si512();
      transpose(x);
      for (int i = 0; i < 16 && d + i < depth; ++i)
        _mm512_storeu_si512(panel + (d + i) * kKeyPanel * kUnit, x[i]);
    }
  }
}

// Columns that are multiplied together, when so many are left: 48 if that leaves an even number.
FD_HOST_DEVICE int64_t value_panel(int64_t columns) {
  return columns % (2 * kVec) == 0 ? 2 * kVec : columns > kVec ? 3 * kVec : kVec;
}

FD_HOST_DEVICE __m512i values(const float* row, const float*, __mmask16 here) {
  return _mm512_maskz_loadu_epi32(here, row);
}

FD_HOST_DEVICE __m512i values(const uint16_t* row, const uint16_t* next, __mmask16 here) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, row));
  if (!next) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, next));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// [keys][size] to panels of columns: [keys][columns of the panel] units each, with zeros after size
// and, in bfloat16, after an odd number of keys.
template <class T>
inline void pack_values(const T* from, int64_t stride, int64_t keys, int64_t size, T* to) {
  constexpr int64_t kUnit = 4 / sizeof(T);
  const int64_t all = (size + kVec - 1) / kVec * kVec;
  for (int64_t column = 0; column < all;) {
    const int64_t panel = value_panel(all - column);
    for (int64_t key = 0; key < keys; key += kUnit)
      for (int64_t c = column; c < column + panel; c += kVec, to += kVec * kUnit) {
        const T* row = from + key * stride + c;
        _mm512_storeu_si512(to, values(row, key + 1 < keys ? row + stride : nullptr,
                                       first_lanes(size - c)));
      }
    column += panel;
  }
}

// c[8][columns] = a[8][terms] b, or scale[row] c more; b is packed by pack_values.
template <class T>
inline void multiply_values(const T* a, int64_t stride, const T* b, int64_t terms, float* c,
                            int64_t columns, const float* scale) {
  for (int64_t column = 0; column < columns;) {
    const int64_t panel = value_panel(columns - column);
    const T* from = b + column * terms;
    if (panel == 3 * kVec)
      multiply<3>(a, stride, from, terms, c + column, columns, scale);
    else if (panel == 2 * kVec)
      multiply<2>(a, stride, from, terms, c + column, columns, scale);
    else
      multiply<1>(a, stride, from, terms, c + column, columns, scale);
    column += panel;
  }
}

}  // namespace
}  // namespace fd
