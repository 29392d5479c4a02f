#include "../teacher_step.h"

#include "kernels.h"
#include "run.h"
#include "../simplify.h"

namespace fd {
namespace FD_ISA {
namespace {

template <bool guided, bool target>
void run_row(const TeacherRow& row, const float* z, const float* m, const float* m_u,
             const float* z_t, float* out, int count) {
  const TeacherRow k = row;  // a copy, since out could alias what a reference refers to
#pragma omp simd
  for (int i = 0; i < count; ++i)
    out[i] = teacher_step_element<guided, target>(k, z[i], m[i], guided ? m_u[i] : 0.0f,
                                                  target ? z_t[i] : 0.0f);
}

}  // namespace

void teacher_step(TeacherStep op) {
  constexpr decltype(&run_row<false, false>) runners[2][2] = {
      {run_row<false, false>, run_row<false, true>}, {run_row<true, false>, run_row<true, true>}};
  const auto run_row = runners[op.m_u.data != nullptr][op.z_t.data != nullptr];
  simplify(1, op.size, {&op.z, &op.m, &op.z_t, &op.m_u, &op.out});

  for_runs(op.size, [&](const Run& run) {
    Buffer z, m, z_t, m_u, out_buffer;
    float* out = place(op.out, op.size, run, out_buffer);
    const float w = op.weights ? op.weights[run.sample] : op.w;
    run_row(teacher_row(op.table, op.i[run.sample], w), read(op.z, op.size, run, z),
            read(op.m, op.size, run, m), read(op.m_u, op.size, run, m_u),
            read(op.z_t, op.size, run, z_t), out, run.count);
    write(op.out, op.size, run, out);
  });
}

}  // namespace FD_ISA
}  // namespace fd
