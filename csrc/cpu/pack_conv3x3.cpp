// Sixteen output channels side by side: their nine taps are read for two input channels, and
// G g G^T is written for both, where the convolution takes them together.
#include "../conv3x3.h"

#include "kernels.h"

#if defined(__AVX2__)
#include "gemm.h"
#include "parallel.h"

namespace fd {
namespace FD_ISA {
namespace {

// The taps of 16 output channels, the first of them at `from`.
template <int span>
FD_MEMBER void load_taps(const PackConv3x3& op, const float* from, Vec* g) {
  Vec tap[kVec];
  if (op.stride[2] == 1) {
    FD_UNROLL(16)
    for (int k = 0; k < kVec; ++k) {
      __builtin_prefetch(from + k * op.stride[0] + 8 * op.stride[1]);
      tap[k] = load_first<kTaps>(from + k * op.stride[0]);
    }
    transpose(tap);
  } else {
    alignas(64) float lanes[kTaps][kVec];
    for (int k = 0; k < kVec; ++k)
      for (int i = 0; i < kTaps; ++i) lanes[i][k] = from[k * op.stride[0] + i * op.stride[2]];
    for (int i = 0; i < kTaps; ++i) tap[i] = load(lanes[i]);
  }
  FD_UNROLL(9)
  for (int i = 0; i < kTaps; ++i) g[i / 3 * span + i % 3] = tap[op.turned ? kTaps - 1 - i : i];
}

template <class T, int tile>
FD_BF16 void pack_panel(const PackConv3x3& op, int64_t panel) {
  constexpr int span = tile + 2, positions = span * span;
  T* const out = static_cast<T*>(op.out) + panel * positions * op.inputs * kPanel;
  for (int64_t c = 0; c < op.inputs; c += 2)
    for (int half = 0; half < kPanel; half += kVec) {
      const float* const from =
          op.weight + (panel * kPanel + half) * op.stride[0] + c * op.stride[1];
      Vec g[2][positions];
      for (int k = 0; k < 2; ++k) {
        load_taps<span>(op, from + k * op.stride[1], g[k]);
        FD_UNROLL(3)
        for (int i = 0; i < 3; ++i) Winograd<tile>::filter(g[k] + i, span);
        FD_UNROLL(6)
        for (int i = 0; i < span; ++i) Winograd<tile>::filter(g[k] + i * span, 1);
      }
      T* const to = out + c * kPanel + half * kPair<T>;
      FD_UNROLL(36)
      for (int i = 0; i < positions; ++i)
        store_pair(to + i * op.inputs * kPanel, kPanel, g[0][i], g[1][i]);
    }
}

template <class T>
void run(const PackConv3x3& op) {
  const bool large = op.outputs * op.inputs * kTaps >= kLarge;
  for_each(op.outputs / kPanel, large, [&](int64_t panel) {
    if (op.tile == 4)
      pack_panel<T, 4>(op, panel);
    else
      pack_panel<T, 2>(op, panel);
  });
}

}  // namespace

void pack_conv3x3(PackConv3x3 op) {
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

void pack_conv3x3(PackConv3x3) {}

}  // namespace FD_ISA
}  // namespace fd

#endif
