// Three walks over a block of whole groups, of which all but the first find it in L2: the moments
// of x; dy and its sums; the gradient. The blocks do not depend on the threads, nor do the sums.
#include "../group_norm_silu_backward.h"

#include <algorithm>
#include <numeric>

#include "group_norm_backward_rows.h"
#include "group_norm_totals.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kBlock = 512 * 1024;  // bytes of x, grad and dy
constexpr int64_t kPixels = 8;          // summed in float32: torch's own sums are pairwise

// Rounds the numbers of `width` channels to a parameter's gradient, if it is asked for.
void encode(const Operand& o, int64_t sample, int64_t channel, int64_t width, const double* from) {
  if (!o.data) return;
  for (int64_t c = 0; c < width; ++c) {
    const int64_t at = sample * o.stride[0] + (channel + c) * o.stride[1];
    const float value = static_cast<float>(from[c]);
    if (o.dtype == DType::f32)
      static_cast<float*>(o.data)[at] = value;
    else
      static_cast<uint16_t*>(o.data)[at] =
          o.dtype == DType::bf16 ? to_bf16(value) : to_f16(value);
  }
}

template <class Type, bool with_silu>
struct Work {
  using T = typename Type::T;
  const GroupNormSiluBackward& op;
  const GroupNormSilu& of = op.of;
  const int64_t per_group = of.channels / of.groups;
  // For the gradients of weight and bias: of each sample and channel, (1 + scale) S(dy n), then
  // (1 + scale) S(dy).
  double* const by_sample =
      static_cast<double*>(scratch<1>(2 * of.samples * of.channels * sizeof(double)));

  static T* in(const Operand& o, int64_t sample, int64_t channel) {
    return static_cast<T*>(o.data) + sample * o.stride[0] + channel * o.stride[1];
  }

  // `width` channels, in whole groups, which are walked in rows of `line` columns.
  struct Block {
    const int64_t sample, channel, width;
    double *first, *second, *third;  // of channels: S(dy); S(dy d), then S(dy n)
    Columns of_channels, of_line;
    float *weight, *bias, *scale, *shift, *part_first, *part_second;
    Slopes dy;
    void* totals;

    Block(int64_t sample, int64_t channel, int64_t width, int64_t line, int64_t rows)
        : sample(sample), channel(channel), width(width) {
      const int64_t whole = (line + kLine - 1) / kLine * kLine;
      const int64_t floats = 9 * width + 7 * line + 16 + whole * rows * with_silu;
      first = static_cast<double*>(
          scratch<0>(3 * width * sizeof(double) + Totals::bytes(line) + floats * sizeof(float)));
      second = first + width;
      third = second + width;
      totals = third + width;
      float* at = reinterpret_cast<float*>(static_cast<char*>(totals) + Totals::bytes(line));
      const auto take = [&at](int64_t count) { return (at += count) - count; };
      weight = take(width), bias = take(width), scale = take(width), shift = take(width);
      of_channels = {take(width), take(width), take(width), take(width), take(width)};
      of_line = {take(line), take(line), take(line), take(line), take(line)};
      part_first = take(line), part_second = take(line);
      const auto past = reinterpret_cast<uintptr_t>(at) % 64;
      dy = {at + (64 - past) / sizeof(float), whole};
      std::fill_n(first, 2 * width, 0.0);
    }
  };

  Normal normal(const Totals& totals, int64_t first, int64_t last) const {
    return of.pixels ? totals.normal(first, last, per_group * of.pixels, of.eps) : Normal{};
  }

  // The maps of a group's channels, from `c` on.
  void begin(const Block& block, int64_t c, const Normal& group) const {
    const Columns& k = block.of_channels;
    for (const int64_t end = c + per_group; c < end; ++c) {
      const double more = 1.0 + block.scale[c];
      k.center[c] = static_cast<float>(group.mean);
      k.a[c] = static_cast<float>(group.scale * block.weight[c] * more);
      k.b[c] = static_cast<float>(block.bias[c] * more + block.shift[c] -
                                  k.a[c] * (group.mean - k.center[c]));
    }
  }

  // Those to x's gradient, from the sums.
  void finish(const Block& block, int64_t c, const Normal& group) const {
    const Columns& k = block.of_channels;
    const int64_t start = c, end = c + per_group;
    const double count = static_cast<double>(per_group * of.pixels);
    double first = 0, second = 0;
    for (; c < end; ++c) {
      const double gain = block.weight[c] * (1.0 + block.scale[c]) / count;
      block.second[c] =
          group.scale * (block.second[c] - (group.mean - k.center[c]) * block.first[c]);
      first += gain * block.first[c];
      second += gain * block.second[c];
    }
    const Gradient g = gradient_of(group, k.center[start], first, second);
    std::fill(k.constant + start, k.constant + end, g.constant);
    std::fill(k.slope + start, k.slope + end, g.slope);
  }

  void decode_parameters(const Block& block) const {
    decode(of.weight, 0, block.channel, block.width, 1, block.weight);
    decode(of.bias, 0, block.channel, block.width, 0, block.bias);
    decode(of.scale, block.sample, block.channel, block.width, 0, block.scale);
    decode(of.shift, block.sample, block.channel, block.width, 0, block.shift);
  }

  void encode_gradients(const Block& block) const {
    double* const mine = by_sample + block.sample * 2 * of.channels + block.channel;
    for (int64_t c = 0; c < block.width; ++c) {
      const double more = 1.0 + block.scale[c];
      mine[c] = more * block.second[c];
      mine[of.channels + c] = more * block.first[c];
      block.third[c] = block.weight[c] * block.second[c] + block.bias[c] * block.first[c];
    }
    encode(op.grad_scale, block.sample, block.channel, block.width, block.third);
    encode(op.grad_shift, block.sample, block.channel, block.width, block.first);
  }

  // join() after the sums of each `most` rows.
  template <class Join>
  void sums(const Rows<Type>& x, const Rows<Type>& grad, int64_t most, const Block& block,
            const Columns& k, const Slopes& dy, const Join& join) const {
    for (int64_t row = 0; row < x.count; row += most) {
      slopes_of<Type, with_silu>(x.part(row, most), grad.part(row, most), k,
                                 {dy.at + row * dy.stride, dy.stride}, block.part_first,
                                 block.part_second);
      join();
    }
  }

  // Channels adjacent, so that a pixel is a row.
  void pixels(int64_t sample, int64_t channel, int64_t width) const {
    const Block block(sample, channel, width, width, of.pixels);
    const Rows<Type> x = {in(of.x, sample, channel), of.x.stride[2], of.pixels, width};
    const Rows<Type> grad = {in(op.grad, sample, channel), op.grad.stride[2], of.pixels, width};
    Totals totals(block.totals, width);
    totals.add(x);
    decode_parameters(block);
    for (int64_t c = 0; c < width; c += per_group)
      begin(block, c, normal(totals, c, c + per_group));
    sums(x, grad, kPixels, block, block.of_channels, block.dy, [&] {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) {
        block.first[c] += block.part_first[c];
        block.second[c] += block.part_second[c];
      }
    });
    for (int64_t c = 0; c < width; c += per_group)
      finish(block, c, normal(totals, c, c + per_group));
    encode_gradients(block);
    T* const to = in(of.out, sample, channel);
    for (int64_t row = 0; row < of.pixels; row += kTerms)
      gradient_rows<Type, with_silu>(x.part(row, kTerms), grad.part(row, kTerms),
                                     block.of_channels,
                                     {block.dy.at + row * block.dy.stride, block.dy.stride},
                                     to + row * of.out.stride[2], of.out.stride[2]);
  }

  // Pixels adjacent, so that kLine of them are a row: one group, channel by channel.
  void channels(int64_t sample, int64_t channel) const {
    const int64_t full = of.pixels / kLine, rest = of.pixels % kLine, lines = full + 1;
    const Block block(sample, channel, per_group, kLine, per_group * lines);
    const Columns &one = block.of_channels, &k = block.of_line;
    Totals totals(block.totals, kLine);
    // body(x, grad, dy, out) of a channel's whole lines, and of what is left
    const auto each = [&](int64_t c, const auto& body) {
      const T *x = in(of.x, sample, channel + c), *grad = in(op.grad, sample, channel + c);
      float* const dy = block.dy.at + c * lines * kLine;
      T* const to = in(of.out, sample, channel + c);
      const int64_t at = full * kLine;
      body(Rows<Type>{x, kLine, full, kLine}, Rows<Type>{grad, kLine, full, kLine},
           Slopes{dy, kLine}, to);
      if (rest)
        body(Rows<Type>{x + at, kLine, 1, rest}, Rows<Type>{grad + at, kLine, 1, rest},
             Slopes{dy + at, kLine}, to + at);
    };
    totals.add_channels<Type>(in(of.x, sample, channel), of.x.stride[1], per_group, of.pixels);
    decode_parameters(block);
    const Normal group = normal(totals, 0, kLine);
    begin(block, 0, group);
    for (int64_t c = 0; c < per_group; ++c) {
      std::fill_n(k.center, kLine, one.center[c]);
      std::fill_n(k.a, kLine, one.a[c]);
      std::fill_n(k.b, kLine, one.b[c]);
      each(c, [&](const auto& x, const auto& grad, const Slopes& dy, T*) {
        sums(x, grad, kTerms, block, k, dy, [&] {
          double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
          for (int64_t i = 0; i < x.width; ++i) {
            first += block.part_first[i];
            second += block.part_second[i];
          }
          block.first[c] += first;
          block.second[c] += second;
        });
      });
    }
    finish(block, 0, group);
    encode_gradients(block);
    for (int64_t c = 0; c < per_group; ++c) {
      std::fill_n(k.a, kLine, one.a[c]);
      std::fill_n(k.constant, kLine, one.constant[c]);
      std::fill_n(k.slope, kLine, one.slope[c]);
      each(c, [&](const auto& x, const auto& grad, const Slopes& dy, T* to) {
        gradient_rows<Type, with_silu>(x, grad, k, dy, to, kLine);
      });
    }
  }

  void run() const {
    const bool large = of.samples * of.channels * of.pixels >= kLarge;
    if (of.x.stride[1] == 1 && op.grad.stride[1] == 1 && of.out.stride[1] == 1) {
      // cut where whole groups and whole pieces of a row end
      const int64_t step = std::max<int64_t>(std::lcm(per_group, kLine), 2 * kLine);
      const int64_t steps = of.channels % step ? 1 : of.channels / step;
      const int64_t bytes = of.channels * of.pixels * (2 * sizeof(T) + sizeof(float));
      const int64_t few = of.samples < 8 ? 8 : 1, fitting = (bytes + kBlock - 1) / kBlock;
      const int64_t cuts = large ? std::min(std::max(few, fitting), steps) : 1;
      const int64_t width = of.channels / steps;
      for_each(of.samples * cuts, large, [&](int64_t i) {
        const int64_t first = steps * (i % cuts) / cuts, last = steps * (i % cuts + 1) / cuts;
        pixels(i / cuts, first * width, (last - first) * width);
      });
    } else {
      for_each(of.samples * of.groups, large,
               [&](int64_t i) { channels(i / of.groups, i % of.groups * per_group); });
    }
    const int64_t all = 2 * of.channels;
    double* const total = static_cast<double*>(scratch<0>(all * sizeof(double)));
    std::fill_n(total, all, 0.0);
    for (int64_t i = 0; i < of.samples * all; ++i) total[i % all] += by_sample[i];
    encode(op.grad_weight, 0, 0, of.channels, total);
    encode(op.grad_bias, 0, 0, of.channels, total + of.channels);
  }
};

template <class Type>
void run_as(const GroupNormSiluBackward& op) {
  if (op.of.silu)
    Work<Type, true>{op}.run();
  else
    Work<Type, false>{op}.run();
}

}  // namespace

void group_norm_silu_backward(GroupNormSiluBackward op) {
  if (op.of.channels == 0) return;
  if (op.of.x.dtype == DType::bf16)
    run_as<Bf16>(op);
  else if (op.of.x.dtype == DType::f16)
    run_as<F16>(op);
  else
    run_as<F32>(op);
}

}  // namespace FD_ISA
}  // namespace fd
