#include "../step.h"

#include "../simplify.h"
#include "packs.h"

namespace fd {
namespace gpu {
namespace {

FD_DEVICE Row row_in(const Step& op, int64_t row) {
  if (row >= 0 && row < op.rows) return row_of(op.table, op.rows, row);
  Row lost = {};
  lost.a = lost.d = NAN;
  return lost;
}

// Making noise takes more registers than all else, so it is a constant of the kernel.
template <bool dense, bool makes_noise>
__global__ void __launch_bounds__(kThreads, kBlocks) step_kernel(Step op, int64_t copy_stride) {
  const int64_t row = *op.row;
  const Row k = row_in(op, row);
  const uint32_t noise_row = static_cast<uint32_t>(row);
  for_packs<dense>(op.size, [&](const auto& at) {
    const Pack x = at.read(f32(op.x));
    Pack m = at.read(op.m), r, D, x_next;
    if (op.m_u.data) {
      const Pack m_u = at.read(op.m_u);
      each([&](int i) { m.at[i] = guided(k, m.at[i], m_u.at[i]); });
    }
    each([&](int i) {
      r.at[i] = 1.0f;
      D.at[i] = predicted(k, x.at[i], m.at[i]);
    });
    if (op.v.data) {
      r = at.read(op.v);
      each([&](int i) { r.at[i] = exponential(k.l * r.at[i]); });
    }
    if (op.g.data) {
      const Pack g = at.read(f32(op.g));
      each([&](int i) { D.at[i] = with_classifier(k, D.at[i], r.at[i], g.at[i]); });
    }
    each([&](int i) { x_next.at[i] = next_state(k, x.at[i], D.at[i], m.at[i]); });
    if (op.h.data) {
      Pack h = at.read(f32(op.h));
      each([&](int i) {
        x_next.at[i] = with_history(k, x_next.at[i], h.at[i]);
        h.at[i] = next_history(k, x.at[i], D.at[i]);
      });
      at.write(f32(op.h_next), h);
    }
    if (makes_noise || op.z.data) {
      const Pack z = makes_noise ? make_noise(stream_of(op.streams + 2 * at.sample, noise_row),
                                              at.first)
                                 : at.read(f32(op.z));
      each([&](int i) { x_next.at[i] = with_noise(k, x_next.at[i], r.at[i], z.at[i]); });
    }
    at.write(f32(op.x_next), x_next);
    if (op.copies == 0) return;
    each([&](int i) { x_next.at[i] *= k.c_in; });
    Operand to = op.model_input;
    for (int64_t copy = 0; copy < op.copies; ++copy) {
      at.write(to, x_next);
      to.data = static_cast<char*>(to.data) + copy_stride * bytes_of(to.dtype);
    }
  });
}

}  // namespace

void step(Step op, Queue queue) {
  const int64_t copy_stride = op.size.of[0] * op.model_input.stride[0];
  const bool makes_noise = op.streams && !op.z.data;
  Operand* const all[] = {&op.x, &op.m, &op.m_u, &op.v, &op.g, &op.h, &op.z,
                          &op.x_next, &op.h_next, &op.model_input};
  if (!makes_noise) simplify(0, op.size, all);
  const bool dense = find_wide(op.size, all);
  op.model_input.wide &= is_aligned(op.model_input, {op.copies > 1 ? copy_stride : 0});
  const auto kernel = dense ? makes_noise ? step_kernel<true, true> : step_kernel<true, false>
                      : makes_noise ? step_kernel<false, true> : step_kernel<false, false>;
  launch_packs(queue, op.size, kernel, op, copy_stride);
}

}  // namespace gpu
}  // namespace fd
