// Group norm's gradients against their formulas in float64, in every layout that its loops walk.
#include "../group_norm_silu_backward.h"

#include <algorithm>

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

namespace {

using namespace fd;

struct Shape {
  int64_t samples, channels, pixels, groups;
};

// Rows of less, just, and more than what is done at once; blocks that are cut, and that are not.
constexpr Shape kShapes[] = {{1, 2, 1, 1},     {2, 6, 5, 3},     {3, 40, 7, 8}, {9, 64, 33, 16},
                             {1, 256, 130, 8}, {2, 33, 301, 11}, {1, 0, 4, 1},  {2, 4, 0, 2}};

Operand by_pixel(Field& field, bool last) {  // (sample, channel, pixel)
  const Operand o = field.operand();
  return {o.data, o.dtype, {o.stride[0], o.stride[last ? 3 : 2], o.stride[last ? 2 : 3], 0}};
}

Operand by_channel(Field& field) {
  const Operand o = field.operand();
  return {o.data, o.dtype, {o.stride[0], o.stride[3], 0, 0}};
}

void check(const Kernels& kernels, const Shape& shape, DType dtype, bool last, bool adaptive) {
  const int64_t samples = shape.samples, channels = shape.channels, pixels = shape.pixels;
  const Size size = {{samples, 1, last ? pixels : channels, last ? channels : pixels}};
  const Size one = {{1, 1, 1, channels}}, each = {{samples, 1, 1, channels}};
  Field x(size, dtype, Layout::gaps, 1), grad(size, dtype, Layout::dense, 6);
  Field out(size, dtype, Layout::gaps);
  Field weight(one, DType::f32, Layout::strided, 2), bias(one, dtype, Layout::dense, 3);
  Field scale(each, DType::f32, Layout::gaps, 4), shift(each, dtype, Layout::strided, 5);
  Field to_weight(one, DType::f32, Layout::dense), to_bias(one, dtype, Layout::strided);
  Field to_scale(each, DType::f32, Layout::strided), to_shift(each, dtype, Layout::gaps);
  const auto given = [&](Field& field) { return adaptive ? by_channel(field) : Operand{}; };
  const GroupNormSilu of = {samples, channels, pixels, shape.groups, 1e-5f, adaptive,
                            by_pixel(x, last), by_channel(weight), by_channel(bias),
                            given(scale), given(shift), by_pixel(out, last)};
  kernels.group_norm_silu_backward({of, by_pixel(grad, last), by_channel(to_weight),
                                    by_channel(to_bias), given(to_scale), given(to_shift)});
  const int64_t per_group = channels / shape.groups, elements = channels * pixels;
  const double count = static_cast<double>(per_group * pixels);
  const auto at = [&](int64_t c, int64_t p) { return last ? p * channels + c : c * pixels + p; };
  std::vector<double> want(samples * elements), first(samples * channels), second(first);
  for (int64_t s = 0; s < samples; ++s)
    for (int64_t g = 0; g < shape.groups; ++g) {
      double mean = 0, variance = 0, of_dn = 0, of_dn_n = 0;
      const auto all = [&](auto body) {
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c)
          for (int64_t p = 0; p < pixels; ++p) body(c, at(c, p));
      };
      all([&](int64_t, int64_t e) { mean += x.get(s, e) / count; });
      all([&](int64_t, int64_t e) { variance += std::pow(x.get(s, e) - mean, 2) / count; });
      const double inverse = 1 / std::sqrt(variance + 1e-5);
      const auto normal = [&](int64_t e) { return (x.get(s, e) - mean) * inverse; };
      const auto gain = [&](int64_t c) {
        return weight.get(0, c) * (adaptive ? 1 + scale.get(s, c) : 1);
      };
      all([&](int64_t c, int64_t e) {
        double dy = grad.get(s, e);
        if (adaptive) {
          const double y =
              gain(c) * normal(e) + bias.get(0, c) * (1 + scale.get(s, c)) + shift.get(s, c);
          const double sigmoid = 1 / (1 + std::exp(-y));
          dy *= sigmoid * (1 + y * (1 - sigmoid));
        }
        want[s * elements + e] = dy;
        first[s * channels + c] += dy;
        second[s * channels + c] += dy * normal(e);
        of_dn += gain(c) * dy / count;
        of_dn_n += gain(c) * dy * normal(e) / count;
      });
      all([&](int64_t c, int64_t e) {
        double& dy = want[s * elements + e];
        dy = inverse * (gain(c) * dy - of_dn - normal(e) * of_dn_n);
      });
    }
  const auto summed = [&](const std::vector<double>& sums) {
    return [&](int64_t, int64_t c) {
      double sum = 0;
      for (int64_t s = 0; s < samples; ++s)
        sum += sums[s * channels + c] * (adaptive ? 1 + scale.get(s, c) : 1);
      return sum;
    };
  };
  const double errors[] = {
      out.error([&](int64_t s, int64_t e) { return want[s * elements + e]; }) / out.tolerance(),
      to_weight.error(summed(second)) / to_weight.tolerance(),
      to_bias.error(summed(first)) / to_bias.tolerance(),
      !adaptive ? 0 : to_scale.error([&](int64_t s, int64_t c) {
        const int64_t i = s * channels + c;
        return weight.get(0, c) * second[i] + bias.get(0, c) * first[i];
      }) / to_scale.tolerance(),
      !adaptive ? 0 : to_shift.error([&](int64_t s, int64_t c) {
        return first[s * channels + c];
      }) / to_shift.tolerance()};
  const double worst = *std::max_element(errors, errors + 5);
  CHECK(worst < 8 && !out.overrun() && !to_weight.overrun() && !to_bias.overrun() &&
            !to_scale.overrun() && !to_shift.overrun(),
        "%s dtype=%d last=%d adaptive=%d channels=%d pixels=%d: %g %g %g %g %g tolerances",
        kernels.isa, static_cast<int>(dtype), last, adaptive, static_cast<int>(channels),
        static_cast<int>(pixels), errors[0], errors[1], errors[2], errors[3], errors[4]);
}

// SiLU's slope at its ends, of groups of one element, where y is the bias.
void check_ends(const Kernels& kernels) {
  float x[64] = {}, grad[64], out[64], bias[64], slope[64];
  const float ends[] = {0, -1000, 1000, -90, 90, -87, -3e38f, 3e38f};
  const double wanted[] = {0.5, 0, 1, 0, 1, 0, 0, 1};
  for (int c = 0; c < 64; ++c) bias[c] = ends[c % 8], grad[c] = 1;
  const auto image = [](float* at) { return Operand{at, DType::f32, {64, 1, 64, 0}}; };
  const auto channel = [](float* at) { return Operand{at, DType::f32, {0, 1, 0, 0}}; };
  kernels.group_norm_silu_backward(
      {{1, 64, 1, 64, 1e-5f, true, image(x), {}, channel(bias), {}, {}, image(out)},
       image(grad), {}, channel(slope), {}, {}});
  for (int c = 0; c < 64; ++c)
    CHECK(std::abs(slope[c] - wanted[c % 8]) < 1e-30 + 1e-7 * wanted[c % 8], "%s: at %g: %g",
          kernels.isa, bias[c], slope[c]);
}

}  // namespace

void test_group_norm_silu_backward(const Kernels& kernels) {
  for (const Shape& shape : kShapes)
    for (int type = 0; type < 3; ++type)
      for (bool last : {false, true})
        for (bool adaptive : {false, true})
          check(kernels, shape, static_cast<DType>(type), last, adaptive);
  check_ends(kernels);
}
