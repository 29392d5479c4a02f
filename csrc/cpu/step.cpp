#include "../step.h"

#include <utility>

#include "kernels.h"
#include "run.h"

namespace fd {
namespace FD_ISA {
namespace {

struct Values {
  const float *x, *m, *m_u, *v, *g, *h, *z;
  float *x_next, *h_next;
};

template <unsigned has>
void run_row(const Row& row, const Values& at, int count) {
  const Row k = row;
  const Values p = at;
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const StepInput in = {p.x[i],
                          p.m[i],
                          has & kGuided ? p.m_u[i] : 0.0f,
                          has & kLearned ? p.v[i] : 0.0f,
                          has & kClassifier ? p.g[i] : 0.0f,
                          has & kHistory ? p.h[i] : 0.0f,
                          has & kNoise ? p.z[i] : 0.0f};
    const StepOutput out = step_element<has>(k, in);
    p.x_next[i] = out.x;
    if (has & kHistory) p.h_next[i] = out.h;
  }
}

using RunRow = void (*)(const Row&, const Values&, int);

template <size_t... has>
RunRow pick(unsigned which, std::index_sequence<has...>) {
  static constexpr RunRow all[] = {run_row<has>...};
  return all[which];
}

}  // namespace

void step(Step op) {
  const Row row = row_of(op.table, op.rows, *op.row);
  const uint32_t noise_row = static_cast<uint32_t>(*op.row);
  const int64_t batch = op.size.of[0] * op.model_input.stride[0];
  const unsigned has = (op.m_u.data ? kGuided : 0) | (op.v.data ? kLearned : 0) |
                       (op.g.data ? kClassifier : 0) | (op.h.data ? kHistory : 0) |
                       (op.z.data || op.streams ? kNoise : 0);
  const RunRow run_row = pick(has, std::make_index_sequence<kHasAll + 1>());
  if (op.z.data || !op.streams)
    simplify(0, op.size,
             {&op.x, &op.m, &op.m_u, &op.v, &op.g, &op.h, &op.z, &op.x_next, &op.h_next,
              &op.model_input});

  for_runs(op.size, [&](const Run& run) {
    const auto in = [&](const Operand& o, Buffer& buffer) {
      return read(o, op.size, run, buffer);
    };
    Buffer x, m, m_u, v, g, h, z, x_next, h_next;
    const Place to = place(op.x_next, op.size, run, x_next);
    const Place h_to = place(op.h_next, op.size, run, h_next);
    const float* noise = in(op.z, z);
    if (!noise && op.streams)
      noise = make_noise(stream_of(op.streams + 2 * run.sample, noise_row), run.first, run.count,
                         z.at);
    run_row(row,
            {in(op.x, x), in(op.m, m), in(op.m_u, m_u), in(op.v, v), in(op.g, g), in(op.h, h),
             noise, to.at, h_to.at},
            run.count);
    write(op.x_next, op.size, run, to);
    if (has & kHistory) write(op.h_next, op.size, run, h_to);
    if (op.copies == 0) return;
    Buffer& scaled = x;
    for (int i = 0; i < run.count; ++i) scaled.at[i] = row.c_in * to.at[i];
    Operand copy = op.model_input;
    const int64_t bytes = batch * (copy.dtype == DType::f32 ? 4 : 2);
    for (int64_t k = 0; k < op.copies; ++k) {
      write(copy, op.size, run, {scaled.at, false});
      copy.data = static_cast<char*>(copy.data) + bytes;
    }
  });
}

}  // namespace FD_ISA
}  // namespace fd
