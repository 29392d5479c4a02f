// Noising against its formula in float64.
#include "../noising.h"

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"
#include "noise.h"

void test_noising(const fd::Kernels& kernels) {
  using namespace fd;
  const int64_t streams[] = {3, 4, (1ll << 35) + 3, 1, 7, 1ll << 33}, t[] = {2, 0, 1};
  const float table[3][4] = {
      {0.9f, 0.1f, -0.1f, 0.9f}, {0.5f, 0.8f, 0.0f, 1.0f}, {0.3f, 0.7f, 1.0f, 0.0f}};
  for (const Size& size : kSizes)
    for (Layout layout : kLayouts)
      for (int type = 0; type < 6; ++type) {
        const DType dtype = static_cast<DType>(type % 3);
        const bool given = type < 3;
        Field x0(size, dtype, layout, 1), z(size, dtype, layout, 2);
        Field x_t(size, dtype, layout), target(size, dtype, layout);
        kernels.noising({size, t, table[0], 3, given ? nullptr : streams, 11, x0.operand(),
                         given ? z.operand() : Operand{}, x_t.operand(), target.operand()});
        const auto want = [&](int column) {
          return [&, column](int64_t s, int64_t e) {
            const float* k = table[t[s]] + column;
            return k[0] * x0.get(s, e) +
                   k[1] * (given ? z.get(s, e) : normal64(streams + 2 * s, 11, e));
          };
        };
        const double error = x_t.error(want(0)), target_error = target.error(want(2));
        CHECK(error < x_t.tolerance() && target_error < x_t.tolerance() && !x_t.overrun() &&
                  !target.overrun(),
              "%s type=%d layout=%d elements=%d: %g %g", kernels.isa, type,
              static_cast<int>(layout), static_cast<int>(size.sample()), error, target_error);
      }
}
