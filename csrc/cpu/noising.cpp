#include "../noising.h"

#include "kernels.h"
#include "run.h"

namespace fd {
namespace FD_ISA {

void noising(Noising op) {
  if (op.noise.data || !op.streams) simplify(1, op.size, {&op.x0, &op.noise, &op.x_t, &op.target});

  for_runs(op.size, [&](const Run& run) {
    Buffer x_buffer, z_buffer, x_t_buffer, target_buffer;
    const float* x0 = read(op.x0, op.size, run, x_buffer);
    const float* z = op.noise.data ? read(op.noise, op.size, run, z_buffer)
                                   : make_noise(stream_of(op.streams + 2 * run.sample, op.row),
                                                run.first, run.count, z_buffer.at);
    const Place x_t = place(op.x_t, op.size, run, x_t_buffer);
    const Place target = place(op.target, op.size, run, target_buffer);
    const float* row = op.table + 4 * op.t[run.sample];
    const float k[4] = {row[0], row[1], row[2], row[3]};
    float *x_t_at = x_t.at, *target_at = target.at;
#pragma omp simd
    for (int i = 0; i < run.count; ++i) {
      const NoisingOutput out = noising_element(k, x0[i], z[i]);
      x_t_at[i] = out.x_t;
      target_at[i] = out.target;
    }
    write(op.x_t, op.size, run, x_t);
    write(op.target, op.size, run, target);
  });
}

}  // namespace FD_ISA
}  // namespace fd
