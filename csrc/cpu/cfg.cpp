#include "../cfg.h"

#include "kernels.h"
#include "run.h"
#include "../simplify.h"

namespace fd {
namespace FD_ISA {

void cfg(Cfg op) {
  simplify(op.weights ? 1 : 0, op.size, {&op.m_cond, &op.m_uncond, &op.out});

  for_runs(op.size, [&](const Run& run) {
    Buffer cond_buffer, uncond_buffer, out_buffer;
    const float* cond = read(op.m_cond, op.size, run, cond_buffer);
    const float* uncond = read(op.m_uncond, op.size, run, uncond_buffer);
    float* out = place(op.out, op.size, run, out_buffer);
    const float w_1 = (op.weights ? op.weights[run.sample] : op.w) + 1.0f;
#pragma omp simd
    for (int i = 0; i < run.count; ++i) out[i] = cfg_element(w_1, cond[i], uncond[i]);
    write(op.out, op.size, run, out);
  });
}

}  // namespace FD_ISA
}  // namespace fd
