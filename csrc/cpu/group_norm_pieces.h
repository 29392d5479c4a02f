// Rows of group_norm_silu in pieces of 32 columns: AVX-512 only.
#pragma once

#include "power.h"

namespace fd {
namespace {

constexpr int64_t kPiece = 32;

struct Piece {
  __m512 part[2];
};

// The columns that a piece has of `width`: all but in the last one.
FD_HOST_DEVICE uint32_t columns(int64_t width) {
  return width >= kPiece ? ~0u : (1u << width) - 1;
}

FD_HOST_DEVICE Piece piece(const float* from, uint32_t mask) {
  return {{_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from),
           _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + kVec)}};
}

FD_HOST_DEVICE void put(float* to, const Piece& x, uint32_t mask) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), x.part[0]);
  _mm512_mask_storeu_ps(to + kVec, static_cast<__mmask16>(mask >> 16), x.part[1]);
}

// Of bfloat16 the even columns, then the odd ones: neither way needs a shuffle for each.
FD_HOST_DEVICE Piece piece(const uint16_t* from, uint32_t mask) {
  const __m512i both = _mm512_maskz_loadu_epi16(mask, from);
  const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)}};
}

FD_BF16 FD_MEMBER void put(uint16_t* to, const Piece& x, uint32_t mask) {
  const __m512i half = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(half, _mm512_set1_epi32(0x10001)),
                                         _mm512_set1_epi32(16 << 16));  // 0, 16, 1, 17, ...
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(x.part[1], x.part[0]);
  _mm512_mask_storeu_epi16(to, mask, _mm512_permutexvar_epi16(order, halves));
}

// Numbers of the columns, in the order of a piece of T.
FD_HOST_DEVICE Piece numbers(const float* from, uint32_t mask, const float*) {
  return piece(from, mask);
}

FD_HOST_DEVICE void put_numbers(float* to, const Piece& x, uint32_t mask, const float*) {
  put(to, x, mask);
}

FD_HOST_DEVICE Piece numbers(const float* from, uint32_t mask, const uint16_t*) {
  const Piece x = piece(from, mask);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(x.part[0], even, x.part[1]),
           _mm512_permutex2var_ps(x.part[0], odd, x.part[1])}};
}

FD_HOST_DEVICE void put_numbers(float* to, const Piece& x, uint32_t mask, const uint16_t*) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  put(to,
      {{_mm512_permutex2var_ps(x.part[0], low, x.part[1]),
        _mm512_permutex2var_ps(x.part[0], high, x.part[1])}},
      mask);
}

// Two chains of sums, since one would wait for itself.
template <class T>
inline void pieces_moments(const T* at, int64_t stride, int64_t count, int64_t width,
                           const float* shift, float* sums, float* squares) {
  for (int64_t c = 0; c < width; c += kPiece) {
    const uint32_t mask = columns(width - c);
    const Piece from = numbers(shift + c, mask, at);
    Piece sum[2] = {}, square[2] = {};
    const auto add = [&](const T* row, int chain) __attribute__((always_inline)) {
      const Piece x = piece(row, mask);
      for (int p = 0; p < 2; ++p) {
        const __m512 distance = _mm512_sub_ps(x.part[p], from.part[p]);
        sum[chain].part[p] = _mm512_add_ps(sum[chain].part[p], distance);
        square[chain].part[p] = _mm512_fmadd_ps(distance, distance, square[chain].part[p]);
      }
    };
    const T* row = at + c;
    for (int64_t r = 0; r + 2 <= count; r += 2, row += 2 * stride) {
      add(row, 0);
      add(row + stride, 1);
    }
    if (count % 2) add(row, 0);
    for (int p = 0; p < 2; ++p) {
      sum[0].part[p] = _mm512_add_ps(sum[0].part[p], sum[1].part[p]);
      square[0].part[p] = _mm512_add_ps(square[0].part[p], square[1].part[p]);
    }
    put_numbers(sums + c, sum[0], mask, at);
    put_numbers(squares + c, square[0], mask, at);
  }
}

constexpr float kUnit = -1.44269504f;  // -log2(e): e^-y is 2^(kUnit y)

// y, or its SiLU.
template <bool with_silu>
FD_HOST_DEVICE __m512 activated(__m512 y, const float*) {
  if (!with_silu) return y;
  const __m512 power = power_of_2<5>(_mm512_mul_ps(y, _mm512_set1_ps(kUnit)));
  return _mm512_div_ps(y, _mm512_add_ps(_mm512_set1_ps(1.0f), power));
}

// The SiLU of y = t / kUnit, which is t / (kUnit (1 + 2^t)), to 1e-4: it is rounded to bfloat16.
template <bool with_silu>
FD_HOST_DEVICE __m512 activated(__m512 t, const uint16_t*) {
  if (!with_silu) return t;
  const __m512 unit = _mm512_set1_ps(kUnit);
  return _mm512_mul_ps(t, _mm512_rcp14_ps(_mm512_fmadd_ps(unit, power_of_2<3>(t), unit)));
}

constexpr int64_t kShare = 8;  // rows at a time, which share a and b

template <bool with_silu, class T>
FD_BF16 inline void map_pieces(const T* x, int64_t x_stride, int64_t count, int64_t width, T* out,
                               int64_t out_stride, const float* a, const float* b) {
  const __m512 unit = _mm512_set1_ps(with_silu && sizeof(T) == 2 ? kUnit : 1.0f);
  for (int64_t row = 0; row < count; row += kShare) {
    const int64_t rows = count - row < kShare ? count - row : kShare;
    for (int64_t c = 0; c < width; c += kPiece) {
      const uint32_t mask = columns(width - c);
      Piece gain = numbers(a + c, mask, x), constant = numbers(b + c, mask, x);
      for (int p = 0; p < 2; ++p) {
        gain.part[p] = _mm512_mul_ps(gain.part[p], unit);
        constant.part[p] = _mm512_mul_ps(constant.part[p], unit);
      }
      const T* from = x + row * x_stride + c;
      T* to = out + row * out_stride + c;
      FD_UNROLL(1)
      for (int64_t r = 0; r < rows; ++r, from += x_stride, to += out_stride) {
        for (int64_t ahead = 0; ahead < kPiece; ahead += 64 / sizeof(T))
          __builtin_prefetch(from + kShare * x_stride + ahead);
        Piece y = piece(from, mask);
        for (int p = 0; p < 2; ++p)
          y.part[p] = activated<with_silu>(
              _mm512_fmadd_ps(gain.part[p], y.part[p], constant.part[p]), from);
        put(to, y, mask);
      }
    }
  }
}

}  // namespace
}  // namespace fd
