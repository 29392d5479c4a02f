// What group_norm_silu does with rows of memory: sums down their columns, and the map of a row.
//
// Columns come in pieces of 32, which AVX-512 has code of its own for; what is left after the last
// whole piece, and everything on other machines, is the compiler's. So the bits of a column depend
// on its place in a row: whoever cuts rows cuts them at multiples of kPiece.
#pragma once

#include <type_traits>

#include "../group_norm_silu.h"

#if defined(__AVX512F__)
#include "power.h"
#endif

namespace fd {
namespace {

constexpr int64_t kPiece = 32;

FD_HOST_DEVICE float same(float x) { return x; }

// One dtype in memory.
template <class Stored, float decode_one(Stored), Stored encode_one(float)>
struct As {
  using T = Stored;
  FD_HOST_DEVICE float decode(T x) { return decode_one(x); }
  FD_HOST_DEVICE T encode(float x) { return encode_one(x); }
};
using F32 = As<float, same, same>;
using Bf16 = As<uint16_t, from_bf16, to_bf16>;
using F16 = As<uint16_t, from_f16, to_f16>;

template <class Type>
struct Rows {
  const typename Type::T* at;
  int64_t stride, count, width;

  Rows columns(int64_t from) const { return {at + from, stride, count, width - from}; }
};

// Four rows at a time, since the sums go through memory.
template <class Type, class Term>
FD_HOST_DEVICE void sum_rows(const Rows<Type>& x, float* sums, Term term) {
#pragma omp simd
  for (int64_t c = 0; c < x.width; ++c) sums[c] = 0;
  int64_t row = 0;
  for (; row + 4 <= x.count; row += 4) {
    const auto *r0 = x.at + row * x.stride, *r1 = r0 + x.stride, *r2 = r1 + x.stride,
               *r3 = r2 + x.stride;
#pragma omp simd
    for (int64_t c = 0; c < x.width; ++c)
      sums[c] += (term(r0[c], c) + term(r1[c], c)) + (term(r2[c], c) + term(r3[c], c));
  }
  for (; row < x.count; ++row) {
    const auto* r = x.at + row * x.stride;
#pragma omp simd
    for (int64_t c = 0; c < x.width; ++c) sums[c] += term(r[c], c);
  }
}

template <class Type>
inline void column_moments(const Rows<Type>& x, float* sums, float* squares) {
  const float one = 1.0f / static_cast<float>(x.count);
  sum_rows(x, sums, [](auto v, int64_t) { return Type::decode(v); });
  sum_rows(x, squares, [sums, one](auto v, int64_t c) {
    const float distance = FD_FMA(-one, sums[c], Type::decode(v));
    return distance * distance;
  });
}

template <class Type, bool with_silu>
inline void map_columns(const typename Type::T* x, typename Type::T* out, int64_t width,
                        const float* mean, const float* a, const float* b) {
#pragma omp simd
  for (int64_t c = 0; c < width; ++c)
    out[c] = Type::encode(
        group_norm_silu_element<with_silu>(mean[c], a[c], b[c], Type::decode(x[c])));
}

#if defined(__AVX512F__)

// 32 columns: of bfloat16 the even and the odd ones, which needs no shuffle; else two halves.
struct Piece {
  __m512 part[2];
};

FD_HOST_DEVICE Piece piece(const float* from) {
  return {{_mm512_loadu_ps(from), _mm512_loadu_ps(from + kVec)}};
}

FD_HOST_DEVICE Piece piece(const uint16_t* from) {
  const __m512i both = _mm512_loadu_si512(from);
  const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)}};
}

FD_HOST_DEVICE void put(float* to, const Piece& x, const float*) {
  _mm512_storeu_ps(to, x.part[0]);
  _mm512_storeu_ps(to + kVec, x.part[1]);
}

FD_HOST_DEVICE void put(float* to, const Piece& x, const uint16_t*) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(x.part[0], low, x.part[1]));
  _mm512_storeu_ps(to + kVec, _mm512_permutex2var_ps(x.part[0], high, x.part[1]));
}

// The sum of term(x) down a piece, in four chains since one would wait for its own sums.
template <class T, class Term>
FD_HOST_DEVICE Piece sum_piece(const T* from, int64_t stride, int64_t count, Term term) {
  __m512 sum[4][2];
  for (auto& chain : sum) chain[0] = chain[1] = _mm512_setzero_ps();
  int64_t row = 0;
  for (; row + 4 <= count; row += 4, from += 4 * stride)
    for (int chain = 0; chain < 4; ++chain) {
      const Piece x = piece(from + chain * stride);
      for (int p = 0; p < 2; ++p) sum[chain][p] = term(x.part[p], p, sum[chain][p]);
    }
  for (; row < count; ++row, from += stride) {
    const Piece x = piece(from);
    for (int p = 0; p < 2; ++p) sum[0][p] = term(x.part[p], p, sum[0][p]);
  }
  Piece all;
  for (int p = 0; p < 2; ++p)
    all.part[p] = _mm512_add_ps(_mm512_add_ps(sum[0][p], sum[1][p]),
                                _mm512_add_ps(sum[2][p], sum[3][p]));
  return all;
}

template <class T>
inline int64_t pieces_moments(const T* at, int64_t stride, int64_t count, int64_t width,
                              float* sums, float* squares) {
  const __m512 one = _mm512_set1_ps(1.0f / static_cast<float>(count));
  int64_t c = 0;
  for (; c + kPiece <= width; c += kPiece) {
    const Piece sum = sum_piece(at + c, stride, count, [](__m512 x, int, __m512 so_far)
                                    __attribute__((always_inline)) {
      return _mm512_add_ps(so_far, x);
    });
    const Piece mean = {{_mm512_mul_ps(one, sum.part[0]), _mm512_mul_ps(one, sum.part[1])}};
    const Piece square = sum_piece(at + c, stride, count, [&mean](__m512 x, int p, __m512 so_far)
                                       __attribute__((always_inline)) {
      const __m512 distance = _mm512_sub_ps(x, mean.part[p]);
      return _mm512_fmadd_ps(distance, distance, so_far);
    });
    put(sums + c, sum, at);
    put(squares + c, square, at);
  }
  return c;
}

template <bool with_silu>
FD_HOST_DEVICE __m512 mapped(__m512 x, const float* mean, const float* a, const float* b,
                             bool rough) {
  const __m512 y = _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_sub_ps(x, _mm512_loadu_ps(mean)),
                                   _mm512_loadu_ps(b));
  if (!with_silu) return y;
  const __m512 power = _mm512_mul_ps(y, _mm512_set1_ps(-1.44269504f));
  const __m512 one = _mm512_set1_ps(1.0f);
  // what is rounded to bfloat16 can do with 1e-4
  if (rough) return _mm512_mul_ps(y, _mm512_rcp14_ps(_mm512_add_ps(one, power_of_2<3>(power))));
  return _mm512_div_ps(y, _mm512_add_ps(one, power_of_2<5>(power)));
}

template <bool with_silu>
inline int64_t map_pieces(const float* x, float* out, int64_t width, const float* mean,
                          const float* a, const float* b) {
  int64_t c = 0;
  for (; c + kVec <= width; c += kVec)
    store(out + c, {mapped<with_silu>(load(x + c).v, mean + c, a + c, b + c, false)});
  return c;
}

template <bool with_silu>
FD_BF16 inline int64_t map_pieces(const uint16_t* x, uint16_t* out, int64_t width,
                                  const float* mean, const float* a, const float* b) {
  int64_t c = 0;
  for (; c + kPiece <= width; c += kPiece) {
    const __m512 low = mapped<with_silu>(load(x + c).v, mean + c, a + c, b + c, true);
    const int64_t next = c + kVec;
    const __m512 high =
        mapped<with_silu>(load(x + next).v, mean + next, a + next, b + next, true);
    _mm512_storeu_si512(out + c, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  return c;
}

#endif

// sums[c] and squares[c] of column c: the sum, and that of the squared distances from its mean.
template <class Type>
inline void moments_of(const Rows<Type>& x, float* sums, float* squares) {
  int64_t done = 0;
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<Type, F16>)
    done = pieces_moments(x.at, x.stride, x.count, x.width, sums, squares);
#endif
  column_moments(x.columns(done), sums + done, squares + done);
}

// out = a (x - mean) + b, and SiLU of it.
template <class Type, bool with_silu>
inline void map_row(const typename Type::T* x, typename Type::T* out, int64_t width,
                    const float* mean, const float* a, const float* b) {
  int64_t done = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Type, F32>) {
    done = map_pieces<with_silu>(x, out, width, mean, a, b);
  } else if constexpr (std::is_same_v<Type, Bf16>) {
    static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
    if (has_bf16) done = map_pieces<with_silu>(x, out, width, mean, a, b);
  }
#endif
  map_columns<Type, with_silu>(x + done, out + done, width - done, mean + done, a + done, b + done);
}

}  // namespace
}  // namespace fd
