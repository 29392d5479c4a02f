// What group_norm_silu_backward does with rows of memory: sums down their columns, and the map.
#pragma once

#include "../group_norm_silu_backward.h"
#include "group_norm_rows.h"

namespace fd {
namespace {

// Of the columns of a row: y = a d + b, d = x - center; and what makes x's gradient.
struct Columns {
  float *center, *a, *b, *constant, *slope;
};

// Where dy is kept between the walks: rows of whole pieces.
struct Slopes {
  float* at;
  int64_t stride;
};

#if defined(__AVX512F__)

// SiLU's derivative to 1e-7, since sums of it may be kept in float32.
FD_HOST_DEVICE __m512 silu_slopes(__m512 y) {
  const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
  y = _mm512_max_ps(_mm512_set1_ps(-87.0f), y);  // of NaN: NaN
  const __m512 e = power_of_2<5>(_mm512_mul_ps(y, _mm512_set1_ps(kUnit)));
  const __m512 whole = _mm512_add_ps(one, e), rough = _mm512_rcp14_ps(whole);
  const __m512 s = _mm512_mul_ps(rough, _mm512_fnmadd_ps(whole, rough, two));
  return _mm512_mul_ps(s, _mm512_fmadd_ps(y, _mm512_mul_ps(e, s), one));
}

constexpr int64_t kAhead = 8;  // rows that are fetched meanwhile

// dy is kept in the order of a piece.
template <bool with_silu, class Type>
inline void pieces_slopes(const Rows<Type>& x, const Rows<Type>& grad, const Columns& k,
                          const Slopes& dy, float* first, float* second) {
  for (int64_t c = 0; c < x.width; c += kPiece) {
    const uint32_t mask = columns(x.width - c);
    const Piece center = numbers(k.center + c, mask, x.at), a = numbers(k.a + c, mask, x.at),
                b = numbers(k.b + c, mask, x.at);
    Piece sum = {}, product = {};
    for (int64_t r = 0; r < x.count; ++r) {
      const auto* from = grad.at + r * grad.stride + c;
      for (int64_t ahead = 0; ahead < kPiece; ahead += 64 / sizeof(*from))
        __builtin_prefetch(from + kAhead * grad.stride + ahead);
      Piece d = piece(x.at + r * x.stride + c, mask), slope = piece(from, mask);
      for (int p = 0; p < 2; ++p) {
        d.part[p] = _mm512_sub_ps(d.part[p], center.part[p]);
        if (with_silu) {
          const __m512 y = _mm512_fmadd_ps(a.part[p], d.part[p], b.part[p]);
          slope.part[p] = _mm512_mul_ps(slope.part[p], silu_slopes(y));
        }
        sum.part[p] = _mm512_add_ps(sum.part[p], slope.part[p]);
        product.part[p] = _mm512_fmadd_ps(slope.part[p], d.part[p], product.part[p]);
      }
      if (with_silu) put(dy.at + r * dy.stride + c, slope, ~0u);
    }
    put_numbers(first + c, sum, mask, x.at);
    put_numbers(second + c, product, mask, x.at);
  }
}

template <bool with_silu, class Type>
FD_BF16 inline void pieces_gradient(const Rows<Type>& x, const Rows<Type>& grad, const Columns& k,
                                    const Slopes& dy, typename Type::T* out, int64_t stride) {
  for (int64_t c = 0; c < x.width; c += kPiece) {
    const uint32_t mask = columns(x.width - c);
    const Piece center = numbers(k.center + c, mask, x.at), a = numbers(k.a + c, mask, x.at),
                constant = numbers(k.constant + c, mask, x.at),
                slope = numbers(k.slope + c, mask, x.at);
    for (int64_t r = 0; r < x.count; ++r) {
      const Piece value = piece(x.at + r * x.stride + c, mask);
      Piece y;
      if constexpr (with_silu)
        y = piece(dy.at + r * dy.stride + c, ~0u);
      else
        y = piece(grad.at + r * grad.stride + c, mask);
      for (int p = 0; p < 2; ++p) {
        const __m512 d = _mm512_sub_ps(value.part[p], center.part[p]);
        y.part[p] = _mm512_fmadd_ps(a.part[p], y.part[p],
                                    _mm512_fmadd_ps(slope.part[p], d, constant.part[p]));
      }
      put(out + r * stride + c, y, mask);
    }
  }
}

#endif

// first[c] and second[c]: sums of dy = grad silu'(y) and of dy d. dy is kept, unless it is grad.
template <class Type, bool with_silu>
inline void slopes_of(const Rows<Type>& x, const Rows<Type>& grad, const Columns& k,
                      const Slopes& dy, float* first, float* second) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<Type, F16>)
    if (writes_pieces<Type>()) return pieces_slopes<with_silu>(x, grad, k, dy, first, second);
#endif
  std::fill_n(first, x.width, 0.0f);
  std::fill_n(second, x.width, 0.0f);
  for (int64_t row = 0; row < x.count; ++row) {
    const auto *r = x.at + row * x.stride, *g = grad.at + row * grad.stride;
    float* const to = dy.at + row * dy.stride;
#pragma omp simd
    for (int64_t c = 0; c < x.width; ++c) {
      const float d = Type::decode(r[c]) - k.center[c];
      float value = Type::decode(g[c]);
      if (with_silu) to[c] = value *= silu_slope(FD_FMA(k.a[c], d, k.b[c]));
      first[c] += value;
      second[c] = FD_FMA(value, d, second[c]);
    }
  }
}

// out = a dy + constant + slope d.
template <class Type, bool with_silu>
inline void gradient_rows(const Rows<Type>& x, const Rows<Type>& grad, const Columns& k,
                          const Slopes& dy, typename Type::T* out, int64_t stride) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<Type, F16>)
    if (writes_pieces<Type>()) return pieces_gradient<with_silu>(x, grad, k, dy, out, stride);
#endif
  for (int64_t row = 0; row < x.count; ++row) {
    const auto *r = x.at + row * x.stride, *g = grad.at + row * grad.stride;
    const float* from = dy.at + row * dy.stride;
    auto* to = out + row * stride;
#pragma omp simd
    for (int64_t c = 0; c < x.width; ++c) {
      const float d = Type::decode(r[c]) - k.center[c];
      const float value = with_silu ? from[c] : Type::decode(g[c]);
      to[c] = Type::encode(FD_FMA(k.a[c], value, FD_FMA(k.slope[c], d, k.constant[c])));
    }
  }
}

}  // namespace
}  // namespace fd
