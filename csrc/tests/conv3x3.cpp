// Winograd's convolution against the direct sum in float64.
#include "../conv3x3.h"

#include <algorithm>

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

namespace {

using namespace fd;

// How a weight lies in memory: as torch's, as an image, or as that of which it is the transpose.
enum class Order { contiguous, channels_last, turned };

struct Weight {
  std::vector<float> taps;
  int64_t stride[3];  // of outputs, inputs and taps
  bool turned;

  Weight(int64_t outputs, int64_t inputs, Order order)
      : taps(outputs * inputs * 9), turned(order == Order::turned) {
    uint64_t state = 7;
    for (float& g : taps) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      g = static_cast<float>(static_cast<int64_t>(state) * 0x1p-63 / std::sqrt(inputs));
    }
    const bool last = order == Order::channels_last;
    const int64_t all[] = {turned ? 9 : 9 * inputs, last ? 1 : turned ? 9 * outputs : 9,
                           last ? inputs : 1};
    std::copy(all, all + 3, stride);
  }

  double operator()(int64_t k, int64_t c, int64_t i) const {
    return taps[k * stride[0] + c * stride[1] + (turned ? 8 - i : i) * stride[2]];
  }

  std::vector<float> packed(const Kernels& kernels, int64_t outputs, int64_t inputs, int64_t tile,
                            DType dtype) const {
    std::vector<float> made(outputs * inputs * (tile + 2) * (tile + 2) * bytes_of(dtype) / 4);
    kernels.pack_conv3x3({outputs, inputs, tile, turned, dtype, taps.data(),
                          {stride[0], stride[1], stride[2]}, made.data()});
    return made;
  }
};

void test(const Kernels& kernels, DType dtype, int64_t tile, const Size& out_size, int64_t inputs,
          bool upsample, bool whole, Order order = Order::contiguous) {
  const int64_t samples = out_size.of[0], outputs = out_size.of[1];
  const int64_t height = out_size.of[2], width = out_size.of[3], scale = upsample ? 2 : 1;
  const Size size = {{samples, inputs, height / scale, width / scale}};
  const Layout layout = Layout::channels_last;
  Field x(size, dtype, layout, 1), residual(out_size, dtype, layout, 3);
  Field out(out_size, dtype, layout);
  std::vector<float> bias(samples * outputs);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i % 7) - 3;
  const Weight weight(outputs, inputs, order);
  const std::vector<float> packed = weight.packed(kernels, outputs, inputs, tile, dtype);
  kernels.conv3x3({samples, height, width, outputs, inputs, tile, upsample, dtype, packed.data(),
                   whole ? bias.data() : nullptr, outputs, x.operand(),
                   whole ? residual.operand() : Operand{}, out.operand()});

  const int64_t h = height / scale, w = width / scale;
  const double error = out.error([&](int64_t s, int64_t e) {
    const int64_t k = e / (height * width), row = e / width % height, column = e % width;
    double sum = whole ? bias[s * outputs + k] + residual.get(s, e) : 0.0;
    for (int64_t i = 0; i < 9; ++i) {
      const int64_t r = row + i / 3 - 1, q = column + i % 3 - 1;
      if (r < 0 || r >= height || q < 0 || q >= width) continue;
      const int64_t at = r / scale * w + q / scale;
      for (int64_t c = 0; c < inputs; ++c) sum += weight(k, c, i) * x.get(s, c * h * w + at);
    }
    return sum;
  });
  // Six sigma. Along a line an output adds positions with the squares of A, G and B as weights, 5 or
  // 21.4 together; x has the variance 4/3 and all inputs of a weight 1/3; rounding both factors to
  // bfloat16 errs by 2.3e-3 of a product, and float32 by less than 9e-8 in all.
  const double enlarged = (tile == 4 ? 21.4 : 5) * 2 / 3;
  const double tolerance = 6 * enlarged * (dtype == DType::f32 ? 9e-8 : 2.3e-3);
  CHECK(error < tolerance && !out.overrun(), "%s dtype=%d tile=%d %dx%dx%dx%d %d %d %d: %g",
        kernels.isa, static_cast<int>(dtype), static_cast<int>(tile), static_cast<int>(samples),
        static_cast<int>(outputs), static_cast<int>(height), static_cast<int>(width),
        static_cast<int>(inputs), upsample, whole, error);
}

void test_gradient(const Kernels& kernels, DType dtype, int64_t tile, const Size& size,
                   int64_t inputs) {
  const int64_t samples = size.of[0], outputs = size.of[1], height = size.of[2];
  const int64_t width = size.of[3], pixels = height * width;
  Field x({{samples, inputs, height, width}}, dtype, Layout::channels_last, 1);
  Field grad(size, dtype, Layout::channels_last, 2);
  std::vector<float> out(outputs * inputs * 9, NAN);
  kernels.conv3x3_weight_gradient({samples, height, width, outputs, inputs, tile, dtype, out.data(),
                                   x.operand(), grad.operand()});

  double worst = 0;
  for (int64_t e = 0; e < static_cast<int64_t>(out.size()); ++e) {
    const int64_t k = e / 9 / inputs, c = e / 9 % inputs, down = e % 9 / 3 - 1, right = e % 3 - 1;
    double sum = 0;
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t r = p / width + down, q = p % width + right;
        if (r < 0 || r >= height || q < 0 || q >= width) continue;
        sum += grad.get(s, k * pixels + p) * x.get(s, c * pixels + r * width + q);
      }
    const double error = std::abs(out[e] - sum);
    if (!(error <= worst)) worst = error;
  }
  // Six sigma of a sum of products of variance 16/9, with the relative error measured of the worst
  // tap.
  const double relative = dtype == DType::f32 ? 1e-6 : tile == 4 ? 2e-2 : 4e-3;
  const double tolerance = 6 * relative * 4 / 3 * std::sqrt(samples * pixels);
  CHECK(worst <= tolerance, "%s gradient dtype=%d tile=%d %dx%dx%dx%d %d: %g", kernels.isa,
        static_cast<int>(dtype), static_cast<int>(tile), static_cast<int>(samples),
        static_cast<int>(outputs), static_cast<int>(height), static_cast<int>(width),
        static_cast<int>(inputs), worst);
}

}  // namespace

void test_conv3x3(const fd::Kernels& kernels) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    if (!kernels.conv3x3_runs(dtype)) continue;
    for (int64_t tile : {2, 4}) {
      test(kernels, dtype, tile, {{1, 32, 1, 1}}, 16, false, false);
      test(kernels, dtype, tile, {{2, 32, 5, 7}}, 48, false, true);
      test(kernels, dtype, tile, {{2, 64, 6, 10}}, 80, true, true);
      test(kernels, dtype, tile, {{1, 96, 4, 4}}, 272, false, false);   // panels for threads
      test(kernels, dtype, tile, {{3, 32, 33, 18}}, 32, false, false);  // blocks for threads
      test(kernels, dtype, tile, {{0, 32, 4, 4}}, 16, false, false);
      test(kernels, dtype, tile, {{1, 64, 5, 5}}, 32, false, false, Order::channels_last);
      test(kernels, dtype, tile, {{1, 64, 5, 5}}, 32, false, false, Order::turned);
      test_gradient(kernels, dtype, tile, {{1, 32, 1, 1}}, 16);
      test_gradient(kernels, dtype, tile, {{3, 64, 5, 7}}, 48);
      test_gradient(kernels, dtype, tile, {{1, 32, 6, 5}}, 304);  // shares of the inputs
      test_gradient(kernels, dtype, tile, {{0, 32, 4, 4}}, 16);
    }
  }
}
