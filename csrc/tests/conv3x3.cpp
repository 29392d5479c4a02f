// Winograd's convolution against the direct sum in float64.
#include "../conv3x3.h"

#include <algorithm>

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

namespace {

using namespace fd;

// G g G^T of 3 numbers along a line: what fastdiff/ops/conv3x3.py makes for both tiles.
void transform(int64_t tile, const double* g, double* u) {
  const double p = std::sqrt(0.5), q = std::sqrt(2.0), even = g[0] + g[2];
  if (tile == 2) {
    const double all[] = {g[0], (even + g[1]) / 2, (even - g[1]) / 2, g[2]};
    std::copy(all, all + 4, u);
    return;
  }
  const double half = -(g[0] + g[2] / 2) / 1.5, whole = (g[0] + 2 * g[2]) / 6;
  const double all[] = {g[0],          half - p * g[1] / 1.5, half + p * g[1] / 1.5,
                        whole + q * g[1] / 6, whole - q * g[1] / 6,   g[2]};
  std::copy(all, all + 6, u);
}

struct Weight {
  std::vector<double> direct;   // [outputs][inputs][3][3]
  std::vector<float> wide;      // packed
  std::vector<uint16_t> narrow;

  Weight(int64_t outputs, int64_t inputs, int64_t tile) : direct(outputs * inputs * 9) {
    uint64_t state = 7;
    for (double& g : direct) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      g = static_cast<double>(static_cast<int64_t>(state)) * 0x1p-63 / std::sqrt(inputs);
    }
    const int64_t span = tile + 2, positions = span * span;
    wide.resize(outputs * inputs * positions);
    narrow.resize(wide.size());
    for (int64_t k = 0; k < outputs; ++k)
      for (int64_t c = 0; c < inputs; ++c) {
        const double* g = &direct[(k * inputs + c) * 9];
        double lines[3][6], column[3], u[6];
        for (int i = 0; i < 3; ++i) transform(tile, g + 3 * i, lines[i]);
        for (int64_t j = 0; j < span; ++j) {
          for (int i = 0; i < 3; ++i) column[i] = lines[i][j];
          transform(tile, column, u);
          for (int64_t i = 0; i < span; ++i) {
            const int64_t line = (k / 32 * positions + i * span + j) * inputs;
            wide[(line + c) * 32 + k % 32] = static_cast<float>(u[i]);
            narrow[(line + c / 2 * 2) * 32 + k % 32 * 2 + c % 2] =
                to_bf16(static_cast<float>(u[i]));
          }
        }
      }
  }
};

void test(const Kernels& kernels, DType dtype, int64_t tile, const Size& out_size, int64_t inputs,
          bool upsample, bool whole) {
  const int64_t samples = out_size.of[0], outputs = out_size.of[1];
  const int64_t height = out_size.of[2], width = out_size.of[3], scale = upsample ? 2 : 1;
  const Size size = {{samples, inputs, height / scale, width / scale}};
  const Layout layout = Layout::channels_last;
  Field x(size, dtype, layout, 1), residual(out_size, dtype, layout, 3);
  Field out(out_size, dtype, layout);
  std::vector<float> bias(samples * outputs);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i % 7) - 3;
  const Weight weight(outputs, inputs, tile);
  const void* packed = weight.wide.data();
  if (dtype == DType::bf16) packed = weight.narrow.data();
  kernels.conv3x3({samples, height, width, outputs, inputs, tile, upsample, dtype, packed,
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
      const double* g = &weight.direct[k * inputs * 9 + i];
      for (int64_t c = 0; c < inputs; ++c) sum += g[c * 9] * x.get(s, c * h * w + at);
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
    }
  }
}
