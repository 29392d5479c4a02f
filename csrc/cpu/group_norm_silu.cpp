#include "../group_norm_silu.h"

#include <algorithm>
#include <numeric>

#include "group_norm_rows.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kLine = 128;   // adjacent pixels that are a row
constexpr int64_t kPart = 16384;  // bytes of rows that stay in L1 between two passes

float element(const Operand& o, int64_t sample, int64_t channel, float absent) {
  if (!o.data) return absent;
  const int64_t at = sample * o.stride[0] + channel * o.stride[1];
  if (o.dtype == DType::f32) return static_cast<const float*>(o.data)[at];
  const uint16_t stored = static_cast<const uint16_t*>(o.data)[at];
  return o.dtype == DType::bf16 ? from_bf16(stored) : from_f16(stored);
}

// Sums of columns, and of their squares.
struct Totals {
  double *sums, *squares;
  float *part_sums, *part_squares;

  static size_t bytes(int64_t width) { return width * 24; }

  Totals(void* memory, int64_t width)
      : sums(static_cast<double*>(memory)),
        squares(sums + width),
        part_sums(reinterpret_cast<float*>(squares + width)),
        part_squares(part_sums + width) {
    std::fill_n(sums, 2 * width, 0.0);
  }

  // In parts: two passes over each, from L1, are as exact as two over everything, and the double
  // sums lose nothing. A part's rows depend on the tensor alone, not on who works on it.
  template <class Type>
  void add(const Rows<Type>& x, int64_t row_length) {
    const int64_t fit = kPart / static_cast<int64_t>(sizeof(typename Type::T)) / row_length;
    const int64_t rows = std::max<int64_t>(fit, 16);
    for (int64_t row = 0; row < x.count; row += rows) {
      const int64_t count = std::min(rows, x.count - row);
      moments_of(Rows<Type>{x.at + row * x.stride, x.stride, count, x.width}, part_sums,
                 part_squares);
      const double one = 1.0 / static_cast<double>(count);
#pragma omp simd
      for (int64_t c = 0; c < x.width; ++c) {
        const double sum = part_sums[c];
        sums[c] += sum;
        squares[c] += part_squares[c] + sum * sum * one;
      }
    }
  }

  Normal normal(int64_t first, int64_t last, int64_t count, float eps) const {
    return normal_of(static_cast<double>(count), std::accumulate(sums + first, sums + last, 0.0),
                     std::accumulate(squares + first, squares + last, 0.0), eps);
  }
};

template <class Type, bool with_silu>
struct Work {
  using T = typename Type::T;
  const GroupNormSilu& op;
  const int64_t per_group = op.channels / op.groups;

  const T* in(int64_t sample, int64_t channel) const {
    return static_cast<const T*>(op.x.data) + sample * op.x.stride[0] + channel * op.x.stride[1];
  }

  T* out(int64_t sample, int64_t channel) const {
    return static_cast<T*>(op.out.data) + sample * op.out.stride[0] + channel * op.out.stride[1];
  }

  Affine affine(const Normal& group, int64_t sample, int64_t channel) const {
    return affine_of(group, element(op.weight, 0, channel, 1), element(op.bias, 0, channel, 0),
                     element(op.scale, sample, channel, 0), element(op.shift, sample, channel, 0));
  }

  // Channels adjacent, so that a pixel is a row: channels `first` to `last`, in whole groups.
  void pixels(int64_t sample, int64_t first, int64_t last) const {
    const int64_t width = last - first;
    void* memory = scratch<0>(Totals::bytes(width) + 3 * width * sizeof(float));
    Totals totals(memory, width);
    totals.add(Rows<Type>{in(sample, first), op.x.stride[2], op.pixels, width}, op.channels);
    float *mean = totals.part_squares + width, *a = mean + width, *b = a + width;
    for (int64_t c = 0; c < width;) {
      const Normal group = totals.normal(c, c + per_group, per_group * op.pixels, op.eps);
      for (const int64_t end = c + per_group; c < end; ++c) {
        const Affine k = affine(group, sample, first + c);
        mean[c] = k.mean, a[c] = k.a, b[c] = k.b;
      }
    }
    const T* from = in(sample, first);
    T* to = out(sample, first);
    for (int64_t p = 0; p < op.pixels; ++p, from += op.x.stride[2], to += op.out.stride[2])
      map_row<Type, with_silu>(from, to, width, mean, a, b);
  }

  // Pixels adjacent, so that kLine of them are a row: one group, channel by channel.
  void channels(int64_t sample, int64_t group) const {
    alignas(64) double memory[Totals::bytes(kLine) / sizeof(double)];
    Totals totals(memory, kLine);
    const int64_t first = group * per_group, full = op.pixels / kLine, rest = op.pixels % kLine;
    for (int64_t c = first; c < first + per_group; ++c) {
      const T* x = in(sample, c);
      totals.add(Rows<Type>{x, kLine, full, kLine}, kLine);
      totals.add(Rows<Type>{x + full * kLine, kLine, rest ? 1 : 0, rest}, kLine);
    }
    const Normal normal = totals.normal(0, kLine, per_group * op.pixels, op.eps);
    float mean[kLine], a[kLine], b[kLine];
    std::fill_n(mean, kLine, normal.mean);
    for (int64_t c = first; c < first + per_group; ++c) {
      const Affine k = affine(normal, sample, c);
      std::fill_n(a, kLine, k.a);
      std::fill_n(b, kLine, k.b);
      const T* from = in(sample, c);
      T* to = out(sample, c);
      for (int64_t p = 0; p < op.pixels; p += kLine)
        map_row<Type, with_silu>(from + p, to + p, std::min(kLine, op.pixels - p), mean, a, b);
    }
  }

  void run() const {
    const bool large = op.samples * op.channels * op.pixels >= kLarge;
    if (op.x.stride[1] == 1 && op.out.stride[1] == 1) {
      // Few samples are cut, where whole groups and whole pieces of a row end, in up to 8 parts.
      const int64_t step = std::max<int64_t>(std::lcm(per_group, kPiece), 2 * kPiece);
      const int64_t most = op.channels % step ? 1 : op.channels / step;
      const int64_t cuts = !large || op.samples >= 8 ? 1 : std::min<int64_t>(most, 8);
      const int64_t steps = op.channels / step;
      for_each(op.samples * cuts, large, [&](int64_t i) {
        const int64_t cut = i % cuts;
        if (cuts == 1) return pixels(i, 0, op.channels);
        pixels(i / cuts, steps * cut / cuts * step, steps * (cut + 1) / cuts * step);
      });
    } else {
      for_each(op.samples * op.groups, large,
               [&](int64_t i) { channels(i / op.groups, i % op.groups); });
    }
  }
};

template <class Type>
void run_as(const GroupNormSilu& op) {
  if (op.silu)
    Work<Type, true>{op}.run();
  else
    Work<Type, false>{op}.run();
}

}  // namespace

void group_norm_silu(GroupNormSilu op) {
  if (op.samples * op.channels * op.pixels == 0) return;
  if (op.x.dtype == DType::bf16)
    run_as<Bf16>(op);
  else if (op.x.dtype == DType::f16)
    run_as<F16>(op);
  else
    run_as<F32>(op);
}

}  // namespace FD_ISA
}  // namespace fd
