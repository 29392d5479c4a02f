#include "../noising.h"

#include "../simplify.h"
#include "packs.h"

namespace fd {
namespace gpu {
namespace {

template <bool dense>
__global__ void __launch_bounds__(kThreads, kBlocks) noising_kernel(Noising op) {
  for_packs<dense>(op.size, [&](const auto& at) {
    const int64_t t = op.t[at.sample];
    NoisingRow k = {NAN, NAN, NAN, NAN};
    if (t >= 0 && t < op.rows) k = noising_row(op.table, t);
    Pack x = at.read(op.x0);
    Pack z = op.noise.data
                 ? at.read(op.noise)
                 : make_noise(stream_of(op.streams + 2 * at.sample, op.row), at.first);
    each([&](int i) {
      const NoisingOutput out = noising_element(k, x.at[i], z.at[i]);
      x.at[i] = out.x_t;
      z.at[i] = out.target;
    });
    at.write(op.x_t, x);
    at.write(op.target, z);
  });
}

}  // namespace

void noising(Noising op, Queue queue) {
  if (op.noise.data) simplify(1, op.size, {&op.x0, &op.noise, &op.x_t, &op.target});
  const bool dense = find_wide(op.size, {&op.x0, &op.noise, &op.x_t, &op.target});
  launch_packs(queue, op.size, dense ? noising_kernel<true> : noising_kernel<false>, op);
}

}  // namespace gpu
}  // namespace fd
