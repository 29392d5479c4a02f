#include "../noising.h"

#include "kernels.h"
#include "run.h"
#include "../simplify.h"

namespace fd {
namespace FD_ISA {

void noising(Noising op) {
  const bool makes_noise = op.streams && !op.noise.data;
  if (!makes_noise) simplify(1, op.size, {&op.x0, &op.noise, &op.x_t, &op.target});

  for_runs(op.size, [&](const Run& run) {
    Buffer x0_buffer, z_buffer, x_t_buffer, target_buffer;
    const float* x0 = read(op.x0, op.size, run, x0_buffer);
    const float* z = makes_noise ? make_noise(stream_of(op.streams + 2 * run.sample, op.row),
                                              run.first, run.count, z_buffer.at)
                                 : read(op.noise, op.size, run, z_buffer);
    float* x_t = place(op.x_t, op.size, run, x_t_buffer);
    float* target = place(op.target, op.size, run, target_buffer);
    const NoisingRow k = noising_row(op.table, op.t[run.sample]);
#pragma omp simd
    for (int i = 0; i < run.count; ++i) {
      const NoisingOutput out = noising_element(k, x0[i], z[i]);
      x_t[i] = out.x_t;
      target[i] = out.target;
    }
    write(op.x_t, op.size, run, x_t);
    write(op.target, op.size, run, target);
  });
}

}  // namespace FD_ISA
}  // namespace fd
