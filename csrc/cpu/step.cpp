#include "../step.h"

#include <utility>

#include "kernels.h"
#include "run.h"
#include "../simplify.h"

namespace fd {
namespace FD_ISA {
namespace {

struct Values {
  const float *x, *m, *m_u, *v, *g, *h, *z;
  float *x_next, *h_next;
};

template <unsigned has>
void run_row(const Row& row, const Values& values, int count) {
  const Row k = row;  // copies, since the outputs could alias what a reference refers to
  const Values at = values;
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const StepInput in = {at.x[i],
                          at.m[i],
                          has & kGuided ? at.m_u[i] : 0.0f,
                          has & kLearned ? at.v[i] : 0.0f,
                          has & kClassifier ? at.g[i] : 0.0f,
                          has & kHistory ? at.h[i] : 0.0f,
                          has & kNoise ? at.z[i] : 0.0f};
    const StepOutput out = step_element<has>(k, in);
    at.x_next[i] = out.x;
    if (has & kHistory) at.h_next[i] = out.h;
  }
}

template <size_t... has>
auto row_runner(unsigned which, std::index_sequence<has...>) {
  static constexpr decltype(&run_row<0>) all[] = {run_row<has>...};
  return all[which];
}

void write_input(const Step& op, int64_t copy_stride, const Run& run, float c_in,
                 const float* x_next) {
  Buffer scaled;
#pragma omp simd
  for (int i = 0; i < run.count; ++i) scaled.at[i] = c_in * x_next[i];
  Operand to = op.model_input;
  for (int64_t copy = 0; copy < op.copies; ++copy) {
    write(to, op.size, run, scaled.at);
    to.data = static_cast<char*>(to.data) + copy_stride * bytes_of(to.dtype);
  }
}

}  // namespace

void step(Step op) {
  const Row row = row_of(op.table, op.rows, *op.row);
  const uint32_t noise_row = static_cast<uint32_t>(*op.row);
  const int64_t copy_stride = op.size.of[0] * op.model_input.stride[0];
  const bool makes_noise = op.streams && !op.z.data;
  const unsigned has = (op.m_u.data ? kGuided : 0u) | (op.v.data ? kLearned : 0u) |
                       (op.g.data ? kClassifier : 0u) | (op.h.data ? kHistory : 0u) |
                       (op.z.data || makes_noise ? kNoise : 0u);
  const auto run_row = row_runner(has, std::make_index_sequence<kHasAll + 1>());
  if (!makes_noise)
    simplify(0, op.size,
             {&op.x, &op.m, &op.m_u, &op.v, &op.g, &op.h, &op.z, &op.x_next, &op.h_next,
              &op.model_input});

  for_runs(op.size, [&](const Run& run) {
    const auto values = [&](const Operand& o, Buffer& buffer) {
      return read(o, op.size, run, buffer);
    };
    Buffer x, m, m_u, v, g, h, z, x_next, h_next;
    float* const to = place(op.x_next, op.size, run, x_next);
    float* const h_to = place(op.h_next, op.size, run, h_next);
    const float* noise =
        makes_noise ? make_noise(stream_of(op.streams + 2 * run.sample, noise_row), run.first,
                                 run.count, z.at)
                    : values(op.z, z);
    run_row(row,
            {values(op.x, x), values(op.m, m), values(op.m_u, m_u), values(op.v, v),
             values(op.g, g), values(op.h, h), noise, to, h_to},
            run.count);
    write(op.x_next, op.size, run, to);
    write(op.h_next, op.size, run, h_to);
    if (op.copies) write_input(op, copy_stride, run, row.c_in, to);
  });
}

}  // namespace FD_ISA
}  // namespace fd
