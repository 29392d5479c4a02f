#include "../group_norm_silu.h"

#include <algorithm>
#include <numeric>

#include "group_norm_rows.h"
#include "group_norm_totals.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace fd {
namespace FD_ISA {
namespace {

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
    totals.add_channels<Type>(in(sample, first), op.x.stride[1], per_group, op.pixels);
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
