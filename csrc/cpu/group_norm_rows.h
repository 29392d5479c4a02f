// What group_norm_silu does with rows of memory: moments down their columns, and the map of them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../group_norm_silu.h"

#if defined(__AVX512F__)
#include "group_norm_pieces.h"
#endif

namespace fd {
namespace {

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

  Rows part(int64_t from, int64_t most) const {
    return {at + from * stride, stride, std::min(most, count - from), width};
  }
};

// sums[c] and squares[c] of the distances of column c from shift[c].
template <class Type>
FD_NOINLINE void moments_of(const Rows<Type>& x, const float* shift, float* sums, float* squares) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<Type, F16>)
    return pieces_moments(x.at, x.stride, x.count, x.width, shift, sums, squares);
#endif
  std::fill_n(sums, x.width, 0.0f);
  std::fill_n(squares, x.width, 0.0f);
  for (int64_t row = 0; row < x.count; ++row) {
    const auto* r = x.at + row * x.stride;
#pragma omp simd
    for (int64_t c = 0; c < x.width; ++c) {
      const float distance = Type::decode(r[c]) - shift[c];
      sums[c] += distance;
      squares[c] = FD_FMA(distance, distance, squares[c]);
    }
  }
}

#if defined(__AVX512F__)
template <class Type>
inline bool writes_pieces() {
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
  return !std::is_same_v<Type, Bf16> || has_bf16;
}
#endif

// out = a x + b, and SiLU of it.
template <class Type, bool with_silu>
FD_NOINLINE void map_rows(const Rows<Type>& x, typename Type::T* out, int64_t stride,
                          const float* a, const float* b) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<Type, F16>)
    if (writes_pieces<Type>())
      return map_pieces<with_silu>(x.at, x.stride, x.count, x.width, out, stride, a, b);
#endif
  for (int64_t row = 0; row < x.count; ++row) {
    const auto* r = x.at + row * x.stride;
    auto* to = out + row * stride;
#pragma omp simd
    for (int64_t c = 0; c < x.width; ++c)
      to[c] = Type::encode(group_norm_silu_element<with_silu>(a[c], b[c], Type::decode(r[c])));
  }
}

}  // namespace
}  // namespace fd
