// Group normalisation against its formula in float64, in every layout that its loops walk.
#include "../group_norm_silu.h"

#include <algorithm>

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

namespace {

using namespace fd;

struct Shape {
  int64_t samples, channels, pixels, groups;
};

// Rows of less, just, and more than what is done at once; few samples, which are cut; long
// channels.
constexpr Shape kShapes[] = {{1, 1, 1, 1},    {2, 6, 5, 3},     {3, 40, 7, 8},  {9, 64, 33, 16},
                             {1, 256, 130, 8}, {2, 33, 301, 11}, {1, 160, 300, 16}};

Operand by_pixel(Field& field) {  // (sample, -, channel, pixel) to (sample, channel, pixel)
  Operand o = field.operand();
  o.stride[1] = o.stride[2];
  o.stride[2] = o.stride[3];
  o.stride[3] = 0;
  return o;
}

Operand by_channel(Field& field) {
  Operand o = field.operand();
  o.stride[1] = o.stride[3];
  return o;
}

double expected(double x, double mean, double variance, double weight, double bias, double scale,
                double shift, bool silu) {
  const double y =
      (weight * (x - mean) / std::sqrt(variance + 1e-5) + bias) * (1 + scale) + shift;
  return silu ? y / (1 + std::exp(-y)) : y;
}

void check(const Kernels& kernels, const Shape& shape, DType dtype, bool last, bool adaptive) {
  const Size size = {{shape.samples, 1, shape.channels, shape.pixels}};
  const Size turned = {{shape.samples, 1, shape.pixels, shape.channels}};
  const Size one = {{1, 1, 1, shape.channels}}, each = {{shape.samples, 1, 1, shape.channels}};
  Field x(last ? turned : size, dtype, Layout::gaps, 1);
  Field out(last ? turned : size, dtype, Layout::gaps);
  Field weight(one, DType::f32, Layout::strided, 2), bias(one, dtype, Layout::dense, 3);
  Field scale(each, DType::f32, Layout::gaps, 4), shift(each, dtype, Layout::strided, 5);
  Operand in = by_pixel(x), to = by_pixel(out);
  if (last) std::swap(in.stride[1], in.stride[2]), std::swap(to.stride[1], to.stride[2]);
  kernels.group_norm_silu({shape.samples, shape.channels, shape.pixels, shape.groups, 1e-5f,
                           adaptive, in, by_channel(weight), by_channel(bias),
                           adaptive ? by_channel(scale) : Operand{},
                           adaptive ? by_channel(shift) : Operand{}, to});
  const auto at = [&](int64_t c, int64_t p) {
    return last ? p * shape.channels + c : c * shape.pixels + p;
  };
  const int64_t per_group = shape.channels / shape.groups;
  const double count = static_cast<double>(per_group * shape.pixels);
  std::vector<double> means, variances;
  double far = 0;  // the most standard deviations that a mean is away from 0
  for (int64_t s = 0; s < shape.samples; ++s)
    for (int64_t g = 0; g < shape.groups; ++g) {
      double sum = 0, square = 0;
      const auto each_of = [&](auto body) {
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c)
          for (int64_t p = 0; p < shape.pixels; ++p) body(x.get(s, at(c, p)));
      };
      each_of([&](double v) { sum += v; });
      each_of([&](double v) { square += (v - sum / count) * (v - sum / count); });
      means.push_back(sum / count);
      variances.push_back(square / count);
      far = std::max(far, std::abs(means.back()) / std::sqrt(variances.back() + 1e-5));
    }
  const double error = out.error([&](int64_t s, int64_t e) {
    const int64_t c = last ? e % shape.channels : e / shape.pixels;
    const int64_t g = s * shape.groups + c / per_group;
    return expected(x.get(s, e), means[g], variances[g], weight.get(0, c), bias.get(0, c),
                    adaptive ? scale.get(s, c) : 0, adaptive ? shift.get(s, c) : 0, adaptive);
  });
  CHECK(error < 2 * out.tolerance() + 0x1p-23 * far && !out.overrun(),
        "%s dtype=%d last=%d adaptive=%d channels=%d pixels=%d: %g", kernels.isa,
        static_cast<int>(dtype), last, adaptive, static_cast<int>(shape.channels),
        static_cast<int>(shape.pixels), error);
}

// SiLU at its ends, of a group of one element that bias alone decides.
void check_ends(const Kernels& kernels) {
  float x[64] = {}, out[64], bias[64];
  const float ends[] = {0, -INFINITY, INFINITY, NAN, -1000, 1000, -90, 90};
  for (int c = 0; c < 64; ++c) bias[c] = ends[c % 8];
  kernels.group_norm_silu({1, 64, 1, 64, 1e-5f, true, {x, DType::f32, {64, 1, 64, 0}}, {},
                           {bias, DType::f32, {0, 1, 0, 0}}, {}, {},
                           {out, DType::f32, {64, 1, 64, 0}}});
  for (int c = 0; c < 64; c += 8) {
    const float* y = out + c;
    CHECK(y[0] == 0 && std::isnan(y[1]) && y[2] == INFINITY && std::isnan(y[3]) && y[4] <= 0 &&
              y[4] > -1e-30f && y[5] == 1000 && y[6] <= 0 && y[6] > -1e-30f && y[7] == 90,
          "%s: %g %g %g %g %g %g %g %g", kernels.isa, y[0], y[1], y[2], y[3], y[4], y[5], y[6],
          y[7]);
  }
}

}  // namespace

void test_group_norm_silu(const Kernels& kernels) {
  for (const Shape& shape : kShapes)
    for (int type = 0; type < 3; ++type)
      for (bool last : {false, true})
        for (bool adaptive : {false, true})
          check(kernels, shape, static_cast<DType>(type), last, adaptive);
  check_ends(kernels);
}
