// Some tiles at a time, few enough for L3: x and grad are transformed, then multiplied, position by
// position, over these tiles. A task has the sums of 32 output channels and some input channels at
// all positions, which stay in L2, and transforms them when all tiles are in.
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

constexpr int64_t kGap = 32;  // between positions, as in conv3x3.cpp
constexpr int64_t kSome = 4 << 20, kSums = 1 << 19;  // bytes: of the transformed, of a task's sums

constexpr int kLanes = kRows < 8 ? 4 : 8;  // of a vector, which are rows of a product

// T: float, or uint16_t for bfloat16.
template <class T, int tile>
struct WeightGradient {
  static constexpr int kSpan = tile + 2, kPositions = kSpan * kSpan;

  const Conv3x3WeightGradient& op;
  const Tiles tiling = {tile, op.height, op.width};
  const int64_t tiles = op.samples * tiling.down * tiling.across, panels = op.outputs / kPanel;

  // Tiles at a time, an even number, for the two of a pair.
  const int64_t most = std::max<int64_t>(
      64, kSome / (kPositions * (op.inputs + op.outputs) * static_cast<int64_t>(sizeof(T))));
  const int64_t chunks = std::max<int64_t>((tiles + most - 1) / most, 1);
  const int64_t rows = (tiles + 2 * chunks - 1) / (2 * chunks) * 2;

  // Input channels of a task. The bits of a sum do not depend on how many there are.
  const int64_t share = std::max<int64_t>(
      std::min({op.inputs, kSums / (kPositions * kPanel * 4) / kVec * kVec,
                op.inputs * panels / most_threads() / kVec * kVec}),
      kVec);
  const int64_t shares = (op.inputs + share - 1) / share, tasks = panels * shares;

  // From position to position: of transformed channels, and of a task's sums.
  int64_t stride(int64_t channels) const { return rows * channels + kGap; }
  int64_t sums_stride() const { return share * kPanel + kGap; }

  // Two neighbouring tiles, transformed by `lines`: at each position
  // [channels / width][rows][width], in bfloat16 in pairs of rows. A tile after the last is zero.
  template <int side, int width, class Lines>
  FD_BF16 void transform(const Operand& o, int64_t channels, int64_t t, int64_t row, T* to,
                         const Lines& lines) const {
    const auto window = [&](int64_t t) {
      const Tiles::Place at = tiling[t];
      const int64_t before = side == kSpan ? 1 : 0;
      return Window<T, side>(o, {at.sample, at.row - before, at.column - before},
                             t < tiles ? op.height : 0, op.width);
    };
    const Window<T, side> windows[2] = {window(t), window(t + 1)};
    for (int64_t c = 0; c < channels; c += kVec) {
      Vec d[2][kPositions];
      for (int k = 0; k < 2; ++k) {
        FD_UNROLL(36)
        for (int i = 0; i < side * side; ++i) {
          d[k][i / side * kSpan + i % side] = load(windows[k].at(i, c));
          if (i % side >= side - tile)
            __builtin_prefetch(windows[k].pixel[i] + c + 2 * tile * o.stride[3]);
        }
        FD_UNROLL(6)
        for (int i = 0; i < side; ++i) lines(d[k] + i, kSpan);
        FD_UNROLL(6)
        for (int i = 0; i < kSpan; ++i) lines(d[k] + i * kSpan, 1);
      }
      T* const at = to + c / width * rows * width + row * width + c % width * kPair<T>;
      FD_UNROLL(36)
      for (int i = 0; i < kPositions; ++i)
        store_pair(at + i * stride(channels), width, d[0][i], d[1][i]);
    }
  }

  // Adds the products of `rows` tiles to a task's sums, or sets them.
  FD_BF16 void multiply(int64_t panel, int64_t first, int64_t last, const T* x, const T* grad,
                        float* sums, bool add) const {
    for (int i = 0; i < kPositions; ++i) {
      const T* const a = x + i * stride(op.inputs);
      const T* const b = grad + i * stride(op.outputs) + panel * rows * kPanel;
      for (int64_t k = 0; k < rows; k += kTerms<T>) {
        const int64_t depth = std::min(rows - k, kTerms<T>);
        const Keep keep = {sums + i * sums_stride(), add || k > 0};
        for (int64_t c = first; c < last; c += kLanes) {
          const T* const block = a + c / kVec * rows * kVec + k * kVec;
          const Ahead ahead = {reinterpret_cast<const char*>(block + rows * kVec), 64};
          multiply_rows<kLanes, kVec>(block + c % kVec * kPair<T>, kPair<T>, b + k * kPanel, depth,
                                     keep, c - first, ahead);
        }
      }
    }
  }

  // G^T u G of a task's sums.
  void finish(int64_t panel, int64_t first, int64_t last, const float* sums) const {
    for (int64_t c = first; c < last; ++c)
      for (int half = 0; half < kPanel; half += kVec) {
        const float* const from = sums + (c - first) * kPanel + half;
        Vec u[kPositions], tap[kVec] = {};
        FD_UNROLL(36)
        for (int i = 0; i < kPositions; ++i) u[i] = load(from + i * sums_stride());
        FD_UNROLL(6)
        for (int i = 0; i < kSpan; ++i) Winograd<tile>::taps(u + i, kSpan);
        FD_UNROLL(3)
        for (int i = 0; i < 3; ++i) Winograd<tile>::taps(u + i * kSpan, 1);
        FD_UNROLL(9)
        for (int i = 0; i < kTaps; ++i) tap[i] = u[i / 3 * kSpan + i % 3];
        transpose(tap);
        float* const to = op.out + ((panel * kPanel + half) * op.inputs + c) * kTaps;
        FD_UNROLL(16)
        for (int k = 0; k < kVec; ++k) {
          __builtin_prefetch(to + k * op.inputs * kTaps + 64, 1);
          store_first<kTaps>(to + k * op.inputs * kTaps, tap[k]);
        }
      }
  }

  void run() const {
    if (!tiles) {
      std::fill_n(op.out, op.outputs * op.inputs * kTaps, 0.0f);
      return;
    }
    T* const x = static_cast<T*>(scratch<0>(kPositions * stride(op.inputs) * sizeof(T)));
    T* const grad = static_cast<T*>(scratch<1>(kPositions * stride(op.outputs) * sizeof(T)));
    const int64_t size = kPositions * sums_stride();
    float* const all =
        chunks == 1 ? nullptr : static_cast<float*>(scratch<2>(tasks * size * sizeof(float)));
    const bool large = tiles * kPositions * op.inputs * op.outputs >= kLarge * 64;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for_each(rows / 2, large, [&](int64_t pair) {
        const int64_t row = 2 * pair, t = chunk * rows + row;
        transform<kSpan, kVec>(op.x, op.inputs, t, row, x,
                               [](Vec* d, int step) { Winograd<tile>::input(d, step); });
        transform<tile, kPanel>(op.grad, op.outputs, t, row, grad,
                                [](Vec* y, int step) { Winograd<tile>::gradient(y, step); });
      });
      for_each(tasks, large, [&](int64_t task) {
        const int64_t panel = task / shares, first = task % shares * share;
        const int64_t last = std::min(first + share, op.inputs);
        float* const sums =
            all ? all + task * size : static_cast<float*>(scratch<3>(size * sizeof(float)));
        multiply(panel, first, last, x, grad, sums, chunk > 0);
        if (chunk == chunks - 1) finish(panel, first, last, sums);
      });
    }
  }
};

template <class T>
void run(const Conv3x3WeightGradient& op) {
  if (op.tile == 4)
    WeightGradient<T, 4>{op}.run();
  else
    WeightGradient<T, 2>{op}.run();
}

}  // namespace

void conv3x3_weight_gradient(Conv3x3WeightGradient op) {
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

void conv3x3_weight_gradient(Conv3x3WeightGradient) {}

}  // namespace FD_ISA
}  // namespace fd

#endif
