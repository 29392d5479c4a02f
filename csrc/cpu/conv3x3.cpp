// A block of tiles at a time: its input is transformed; then, for each panel of 32 output channels,
// come the products at all positions of a tile and the transform of the outputs. The panel's
// weights stream from L3, 8 KB ahead; each serves all the tiles of the block.
#include "../conv3x3.h"

#include "kernels.h"

#if defined(__AVX2__)
#include <algorithm>

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"
#include "window.h"

namespace fd {
namespace FD_ISA {
namespace {

// After each position's rows: a power of two apart, all positions would share few sets of a cache.
constexpr int64_t kGap = 32;

// T: float, or uint16_t for bfloat16.
template <class T, int tile>
struct Convolution {
  static constexpr int kSpan = tile + 2, kPositions = kSpan * kSpan;
  static constexpr int64_t kMost = tile == 4 ? 32 : 64;  // tiles of a block

  const Conv3x3& op;
  const Tiles tiling = {tile, op.height, op.width};
  const int64_t tiles = op.samples * tiling.down * tiling.across, panels = op.outputs / kPanel;

  // From position to position, for `rows` tiles: of their input, and of a panel's products.
  int64_t input_stride(int64_t rows) const { return rows * op.inputs + kGap; }
  int64_t product_stride(int64_t rows) const { return rows * kPanel + kGap; }

  T* input_memory(int64_t rows) const {
    return static_cast<T*>(scratch<0>(kPositions * input_stride(rows) * sizeof(T)));
  }
  float* product_memory(int64_t rows) const {
    return static_cast<float*>(scratch<1>(kPositions * product_stride(rows) * sizeof(float)));
  }

  // B^T d B of tile t at each position, `stride` apart. FD_BF16 is for `store`: of float32, there is
  // nothing in it that needs the instructions.
  FD_BF16 void transform_input(int64_t t, T* to, int64_t stride) const {
    const Tiles::Place at = tiling[t];
    const int64_t scale = op.upsample ? 2 : 1;
    const Window<T, kSpan> window(op.x, {at.sample, at.row - 1, at.column - 1}, op.height, op.width,
                                  scale);
    for (int64_t c = 0; c < op.inputs; c += kVec) {
      Vec d[kPositions];
      FD_UNROLL(36)
      for (int i = 0; i < kPositions; ++i) {
        d[i] = load(window.at(i, c));
        if (i % kSpan >= 2) __builtin_prefetch(window.pixel[i] + c + tile / scale * op.x.stride[3]);
      }
      FD_UNROLL(6)
      for (int k = 0; k < kSpan; ++k) Winograd<tile>::input(d + k, kSpan);
      FD_UNROLL(6)
      for (int k = 0; k < kSpan; ++k) Winograd<tile>::input(d + k * kSpan, 1);
      FD_UNROLL(36)
      for (int i = 0; i < kPositions; ++i) store(to + i * stride + c, d[i]);
    }
  }

  // A^T m A of tile t for 32 channels from `channel` on, with bias and residual. m: at each
  // position, `stride` apart.
  FD_BF16 void transform_output(int64_t t, int64_t channel, const float* m, int64_t stride) const {
    const Tiles::Place at = tiling[t];
    const int64_t rows = std::min<int64_t>(tile, op.height - at.row);
    const int64_t columns = std::min<int64_t>(tile, op.width - at.column);
    const auto first = [&](const Operand& o) {
      return static_cast<T*>(o.data) + at.sample * o.stride[0] + at.row * o.stride[2] +
             at.column * o.stride[3] + channel;
    };
    T* const out = first(op.out);
    const T* const residual = op.residual.data ? first(op.residual) : nullptr;
    const float* const bias = op.bias ? op.bias + at.sample * op.bias_stride + channel : nullptr;
    prefetch_next<1>(op.out, out);
    if (residual) prefetch_next<0>(op.residual, residual);
    for (int c = 0; c < kPanel; c += kVec) {
      Vec y[kPositions];
      FD_UNROLL(36)
      for (int i = 0; i < kPositions; ++i) y[i] = load(m + i * stride + c);
      FD_UNROLL(6)
      for (int k = 0; k < kSpan; ++k) Winograd<tile>::output(y + k, kSpan);
      FD_UNROLL(4)
      for (int k = 0; k < tile; ++k) Winograd<tile>::output(y + k * kSpan, 1);
      const Vec constant = bias ? load(bias + c) : Vec{};
      FD_UNROLL(4)
      for (int i = 0; i < tile; ++i) {
        FD_UNROLL(4)
        for (int j = 0; j < tile; ++j) {
          if (i >= rows || j >= columns) continue;
          Vec value = y[i * kSpan + j] + constant;
          if (residual)
            value = value +
                    load(residual + i * op.residual.stride[2] + j * op.residual.stride[3] + c);
          store(out + i * op.out.stride[2] + j * op.out.stride[3] + c, value);
        }
      }
    }
  }

  // What the next tile of the line will touch, to read (0) or to write (1).
  template <int write>
  static void prefetch_next(const Operand& o, const T* at) {
    for (int i = 0; i < tile; ++i)
      for (int j = 0; j < tile; ++j)
        for (int c = 0; c < kPanel; c += 64 / sizeof(T))
          __builtin_prefetch(at + i * o.stride[2] + (j + tile) * o.stride[3] + c, write);
  }

  // The outputs of a panel for tiles `from` to `from + rows`, of their transformed input.
  void finish(int64_t panel, int64_t from, int64_t rows, const T* input) const {
    const int64_t stride = product_stride(rows);
    float* const products = product_memory(rows);
    const T* weight = static_cast<const T*>(op.weight) + panel * kPositions * op.inputs * kPanel;
    for (int i = 0; i < kPositions; ++i, input += input_stride(rows), weight += op.inputs * kPanel)
      for (int64_t c = 0; c < op.inputs; c += kTerms<T>)
        multiply(rows, input + c, op.inputs, weight + c * kPanel,
                 std::min(op.inputs - c, kTerms<T>), Keep{products + i * stride, c > 0});
    for (int64_t r = 0; r < rows; ++r)
      transform_output(from + r, panel * kPanel, products + r * kPanel, stride);
  }

  void run() const {
    const int64_t threads = most_threads(), needed = (tiles + kMost - 1) / kMost;
    const bool large = tiles * kPositions * op.inputs * op.outputs >= kLarge * 64;
    if (needed >= threads || panels < threads || !large) {  // each thread has blocks of its own
      const int64_t blocks = large ? (needed + threads - 1) / threads * threads : needed;
      for_each(blocks, large, [&](int64_t b) {
        const int64_t from = tiles * b / blocks, rows = tiles * (b + 1) / blocks - from;
        T* const input = input_memory(rows);
        for (int64_t r = 0; r < rows; ++r)
          transform_input(from + r, input + r * op.inputs, input_stride(rows));
        for (int64_t p = 0; p < panels; ++p) finish(p, from, rows, input);
      });
      return;
    }
    for (int64_t b = 0; b < needed; ++b) {  // few tiles: each thread has panels, and reads those
      const int64_t from = tiles * b / needed, rows = tiles * (b + 1) / needed - from;
      T* const input = input_memory(rows);
      for_each(rows, large, [&](int64_t r) {
        transform_input(from + r, input + r * op.inputs, input_stride(rows));
      });
      for_each(panels, large, [&](int64_t p) { finish(p, from, rows, input); });
    }
  }
};

template <class T>
void run(const Conv3x3& op) {
  if (op.tile == 4)
    Convolution<T, 4>{op}.run();
  else
    Convolution<T, 2>{op}.run();
}

}  // namespace

bool conv3x3_runs(DType dtype) {
#if defined(__AVX512F__)
  if (dtype == DType::bf16) return __builtin_cpu_supports("avx512bf16");
#endif
  return dtype == DType::f32;
}

void conv3x3(Conv3x3 op) {
  if (op.dtype == DType::f32) return run<float>(op);
#if defined(__AVX512F__)
  run<uint16_t>(op);
#endif
}

}  // namespace FD_ISA
}  // namespace fd

#else

namespace fd {
namespace FD_ISA {

bool conv3x3_runs(DType) { return false; }
void conv3x3(Conv3x3) {}

}  // namespace FD_ISA
}  // namespace fd

#endif
