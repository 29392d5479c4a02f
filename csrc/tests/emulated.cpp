// The CUDA kernels in the emulator, with the calls of the CPU's.
#include <cmath>
#include <vector>

#include "../cpu/kernels.h"
#include "../cuda/kernels.h"
#include "check.h"

namespace {

constexpr fd::gpu::Queue kQueue = {0, nullptr};

template <class Op, void run(Op, fd::gpu::Queue)>
void on_queue(Op op) {
  run(op, kQueue);
}

void group_norm_silu(fd::GroupNormSilu op) {
  std::vector<double> scratch(op.samples * op.groups * fd::gpu::kParts * 2, NAN);
  fd::gpu::group_norm_silu(op, scratch.data(), kQueue);
}

}  // namespace

void test_emulated() {
  fd::Kernels kernels = {};
  kernels.isa = "emulated";
  kernels.step = on_queue<fd::Step, fd::gpu::step>;
  kernels.noising = on_queue<fd::Noising, fd::gpu::noising>;
  kernels.cfg = on_queue<fd::Cfg, fd::gpu::cfg>;
  kernels.randn = on_queue<fd::Randn, fd::gpu::randn>;
  kernels.group_norm_silu = group_norm_silu;
  CHECK(!fd::gpu::problem(), "%s", fd::gpu::problem());
  test_barrier();
  test_randn(kernels);
  test_step(kernels);
  test_noising(kernels);
  test_cfg(kernels);
  test_group_norm_silu(kernels);
  std::printf("emulated: tested\n");
}
