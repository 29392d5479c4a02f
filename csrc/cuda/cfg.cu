#include "../cfg.h"

#include "../simplify.h"
#include "packs.h"

namespace fd {
namespace gpu {
namespace {

template <bool dense>
__global__ void __launch_bounds__(kThreads, kBlocks) cfg_kernel(Cfg op) {
  for_packs<dense>(op.size, [&](const auto& at) {
    const float w_1 = (op.weights ? op.weights[at.sample] : op.w) + 1.0f;
    Pack m = at.read(op.m_cond);
    const Pack uncond = at.read(op.m_uncond);
    each([&](int i) { m.at[i] = cfg_element(w_1, m.at[i], uncond.at[i]); });
    at.write(op.out, m);
  });
}

}  // namespace

void cfg(Cfg op, Queue queue) {
  simplify(op.weights ? 1 : 0, op.size, {&op.m_cond, &op.m_uncond, &op.out});
  const bool dense = find_wide(op.size, {&op.m_cond, &op.m_uncond, &op.out});
  launch_packs(queue, op.size, dense ? cfg_kernel<true> : cfg_kernel<false>, op);
}

}  // namespace gpu
}  // namespace fd
