// What a group norm and its gradient share: parameters as floats, and the moments of a group.
#pragma once

#include <algorithm>

#include "group_norm_rows.h"

namespace fd {
namespace {

constexpr int64_t kLine = 32;    // adjacent pixels that are a row
constexpr int64_t kTerms = 128;  // rows that are summed in float32

// `width` elements of a parameter, from `channel` on.
template <class Type>
inline void decode(const Operand& o, int64_t sample, int64_t channel, int64_t width, float* to) {
  const auto* from = static_cast<const typename Type::T*>(o.data) + sample * o.stride[0];
  for (int64_t c = 0; c < width; ++c) to[c] = Type::decode(from[(channel + c) * o.stride[1]]);
}

FD_NOINLINE void decode(const Operand& o, int64_t sample, int64_t channel, int64_t width,
                        float absent, float* to) {
  if (!o.data)
    std::fill_n(to, width, absent);
  else if (o.dtype == DType::f32)
    decode<F32>(o, sample, channel, width, to);
  else if (o.dtype == DType::bf16)
    decode<Bf16>(o, sample, channel, width, to);
  else
    decode<F16>(o, sample, channel, width, to);
}

// Sums of columns, and of their squares.
struct Totals {
  double *sums, *squares;
  float *shift, *part_sums, *part_squares;

  static size_t bytes(int64_t width) { return width * 28; }

  Totals(void* memory, int64_t width)
      : sums(static_cast<double*>(memory)),
        squares(sums + width),
        shift(reinterpret_cast<float*>(squares + width)),
        part_sums(shift + width),
        part_squares(part_sums + width) {
    std::fill_n(sums, 2 * width, 0.0);
  }

  // In one pass: distances from about the mean, which the first rows tell, lose nothing in
  // float32, and the double sums neither. Parts depend on the tensor alone, not on who works.
  template <class Type>
  void add(const Rows<Type>& x) {
    if (x.count == 0) return;
    const Rows<Type> first = x.part(0, 16);
    std::fill_n(shift, x.width, 0.0f);
    moments_of(first, shift, part_sums, part_squares);
    const float one = 1.0f / static_cast<float>(first.count);
    for (int64_t c = 0; c < x.width; ++c) shift[c] = one * part_sums[c];
    for (int64_t row = 0; row < x.count; row += kTerms) {
      const Rows<Type> part = x.part(row, kTerms);
      moments_of(part, shift, part_sums, part_squares);
      const double count = static_cast<double>(part.count);
#pragma omp simd
      for (int64_t c = 0; c < x.width; ++c)
        add_shifted(sums[c], squares[c], count, shift[c], part_sums[c], part_squares[c]);
    }
  }

  // Channels `stride` apart, of adjacent pixels: all of them in one run if nothing is between.
  template <class Type>
  void add_channels(const typename Type::T* x, int64_t stride, int64_t channels, int64_t pixels) {
    if (stride == pixels) pixels *= channels, channels = 1;
    const int64_t full = pixels / kLine;
    for (int64_t c = 0; c < channels; ++c, x += stride) {
      add(Rows<Type>{x, kLine, full, kLine});
      add(Rows<Type>{x + full * kLine, kLine, 1, pixels % kLine});
    }
  }

  Normal normal(int64_t first, int64_t last, int64_t count, float eps) const {
    double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
    for (int64_t c = first; c < last; ++c) {
      sum += sums[c];
      square += squares[c];
    }
    return normal_of(static_cast<double>(count), sum, square, eps);
  }
};

}  // namespace
}  // namespace fd
