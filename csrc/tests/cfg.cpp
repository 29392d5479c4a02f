// Guidance against its formula in float64.
#include "../cfg.h"

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

void test_cfg(const fd::Kernels& kernels) {
  using namespace fd;
  const float weights[] = {-1, 0.5f, 3};
  for (const Size& size : kSizes)
    for (Layout layout : kLayouts)
      for (int type = 0; type < 6; ++type) {
        const DType dtype = static_cast<DType>(type % 3);
        const bool each = type < 3;
        // Layouts that differ, too.
        Field cond(size, dtype, layout, 1), uncond(size, dtype, Layout::strided, 2);
        Field out(size, dtype, each ? layout : Layout::dense);
        kernels.cfg({size, each ? weights : nullptr, 1.5f, cond.operand(), uncond.operand(),
                     out.operand()});
        const double error = out.error([&](int64_t s, int64_t e) {
          const double w = each ? weights[s] : 1.5;
          return (w + 1) * cond.get(s, e) - w * uncond.get(s, e);
        });
        CHECK(error < out.tolerance() && !out.overrun(), "%s type=%d layout=%d elements=%d: %g",
              kernels.isa, type, static_cast<int>(layout), static_cast<int>(size.sample()), error);
      }
}
