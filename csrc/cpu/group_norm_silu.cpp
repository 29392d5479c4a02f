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

constexpr int64_t kLine = 32;    // adjacent pixels that are a row
constexpr int64_t kTerms = 128;  // rows that are summed in float32

// `width` elements of a parameter, from `channel` on.
template <class Type>
void decode(const Operand& o, int64_t sample, int64_t channel, int64_t width, float* to) {
  const auto* from = static_cast<const typename Type::T*>(o.data) + sample * o.stride[0];
  for (int64_t c = 0; c < width; ++c) to[c] = Type::decode(from[(channel + c) * o.stride[1]]);
}

void decode(const Operand& o, int64_t sample, int64_t channel, int64_t width, float absent,
            float* to) {
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

  // The maps of channels `first` to `first + width`, of the group that `normal(channel)` gives.
  // parameters: space for 4 width numbers; a and b are the first two quarters.
  template <class Group>
  void affine(int64_t sample, int64_t first, int64_t width, float* parameters, Group normal) const {
    float *weight = parameters, *bias = weight + width, *scale = bias + width,
          *shift = scale + width;
    decode(op.weight, 0, first, width, 1, weight);
    decode(op.bias, 0, first, width, 0, bias);
    decode(op.scale, sample, first, width, 0, scale);
    decode(op.shift, sample, first, width, 0, shift);
    for (int64_t c = 0; c < width;) {
      const Normal group = normal(c);
      for (const int64_t end = c + per_group; c < end; ++c) {
        const Affine k = affine_of(group, weight[c], bias[c], scale[c], shift[c]);
        weight[c] = k.a, bias[c] = k.b;
      }
    }
  }

  // Channels adjacent, so that a pixel is a row: channels `first` to `last`, in whole groups.
  void pixels(int64_t sample, int64_t first, int64_t last) const {
    const int64_t width = last - first;
    void* memory = scratch<0>(Totals::bytes(width) + 4 * width * sizeof(float));
    Totals totals(memory, width);
    const Rows<Type> x = {in(sample, first), op.x.stride[2], op.pixels, width};
    totals.add(x);
    float* const a = totals.part_squares + width;
    affine(sample, first, width, a, [&](int64_t c) {
      return totals.normal(c, c + per_group, per_group * op.pixels, op.eps);
    });
    map_rows<Type, with_silu>(x, out(sample, first), op.out.stride[2], a, a + width);
  }

  // Pixels adjacent, so that kLine of them are a row: one group, channel by channel.
  void channels(int64_t sample, int64_t group) const {
    const int64_t first = group * per_group;
    void* memory = scratch<0>(Totals::bytes(kLine) + 4 * per_group * sizeof(float));
    Totals totals(memory, kLine);
    const bool adjacent = op.x.stride[1] == op.pixels;
    const int64_t runs = adjacent ? 1 : per_group, length = per_group * op.pixels / runs;
    for (int64_t c = 0; c < runs; ++c) {
      const T* x = in(sample, first + c);
      totals.add(Rows<Type>{x, kLine, length / kLine, kLine});
      totals.add(Rows<Type>{x + length / kLine * kLine, kLine, 1, length % kLine});
    }
    float* const parameters = totals.part_squares + kLine;
    affine(sample, first, per_group, parameters, [&](int64_t) {
      return totals.normal(0, kLine, per_group * op.pixels, op.eps);
    });
    const int64_t full = op.pixels / kLine, rest = op.pixels % kLine;
    float a[kLine], b[kLine];
    for (int64_t c = 0; c < per_group; ++c) {
      std::fill_n(a, kLine, parameters[c]);
      std::fill_n(b, kLine, parameters[per_group + c]);
      const T* from = in(sample, first + c);
      T* to = out(sample, first + c);
      map_rows<Type, with_silu>({from, kLine, full, kLine}, to, kLine, a, b);
      map_rows<Type, with_silu>({from + full * kLine, kLine, 1, rest}, to + full * kLine, kLine, a,
                                b);
    }
  }

  void run() const {
    const bool large = op.samples * op.channels * op.pixels >= kLarge;
    if (op.x.stride[1] == 1 && op.out.stride[1] == 1) {
      // Few samples are cut, where whole groups and whole pieces of a row end, in up to 8 parts.
      const int64_t step = std::max<int64_t>(std::lcm(per_group, kLine), 2 * kLine);
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
