// The teacher's step against its formula in float64.
#include "../teacher_step.h"

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

void test_teacher_step(const fd::Kernels& kernels) {
  using namespace fd;
  const int64_t at[] = {1, 0, 1};
  const float weights[] = {-1, 0.5f, 3};
  const float table[2][5] = {{1.25f, -0.75f, 0.6f, 0.3f, -0.2f}, {0.5f, 2.0f, -1.1f, 0.8f, 0.4f}};
  for (const Size& size : kSizes)
    for (Layout layout : kLayouts)
      for (int type = 0; type < 12; ++type) {
        const DType dtype = static_cast<DType>(type % 3);
        const bool guided = type / 3 % 2, target = type / 6, each = target;
        Field z(size, DType::f32, layout, 1), m(size, dtype, Layout::strided, 2);
        Field m_u(size, dtype, layout, 3), z_t(size, DType::f32, layout, 4);
        Field out(size, DType::f32, layout);
        kernels.teacher_step({size, table[0], 2, at, each ? weights : nullptr, 1.5f, z.operand(),
                              m.operand(), target ? z_t.operand() : Operand{},
                              guided ? m_u.operand() : Operand{}, out.operand()});
        const double error = out.error([&](int64_t s, int64_t e) {
          const float* k = table[at[s]];
          const double w = each ? weights[s] : 1.5;
          const double model =
              guided ? (w + 1) * m.get(s, e) - w * m_u.get(s, e) : m.get(s, e);
          const double D = k[0] * z.get(s, e) + k[1] * model;
          return k[2] * z.get(s, e) + k[3] * D + (target ? k[4] * z_t.get(s, e) : 0);
        });
        CHECK(error < out.tolerance() && !out.overrun(), "%s type=%d layout=%d elements=%d: %g",
              kernels.isa, type, static_cast<int>(layout), static_cast<int>(size.sample()), error);
      }
}
