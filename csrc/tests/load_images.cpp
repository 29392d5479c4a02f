// Images against their formula in float64: mirrored, padded, from and to any layout.
#include "../load_images.h"

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

void test_load_images(const fd::Kernels& kernels) {
  using namespace fd;
  const int64_t index[] = {3, 0, 3};
  const bool flips[] = {true, false, false};
  constexpr Size kOuts[] = {{{3, 1, 7, 7}}, {{3, 3, 9, 40}}, {{2, 4, 21, 6}}, {{0, 3, 9, 9}}};
  for (const Size& size : kOuts)
    for (Layout layout : kLayouts)
      for (int type = 0; type < 12; ++type) {
        const DType dtype = static_cast<DType>(type % 3);
        const bool mirrors = type / 3 % 2, last = type / 6;  // of the images: channels last
        const int64_t pad = type % 4 / 2 * 2, c = size.of[1];
        const int64_t h = size.of[2] - 2 * pad, w = size.of[3] - 2 * pad;
        // images lie apart, and nothing may be read beyond the last
        const Size stride = last ? Size{{c * h * w + 3, 1, w * c, c}}
                                 : Size{{c * h * w + 3, h * w, w, 1}};
        std::vector<uint8_t> images(3 * stride.of[0] + c * h * w);
        for (size_t i = 0; i < images.size(); ++i) images[i] = static_cast<uint8_t>(i * 37 + 11);
        Field out(size, dtype, layout);
        kernels.load_images({size, images.data(), 4, stride, index, mirrors ? flips : nullptr, pad,
                             out.operand()});
        const double error = out.error([&](int64_t s, int64_t e) {
          const int64_t y = e / size.of[3] % size.of[2] - pad;
          int64_t x = e % size.of[3] - pad;
          if (mirrors && flips[s]) x = w - 1 - x;
          if (x < 0 || x >= w || y < 0 || y >= h) return -1.0;
          const int64_t plane = e / (size.of[2] * size.of[3]);
          const int64_t at = index[s] * stride.of[0] + plane * stride.of[1] + y * stride.of[2] +
                             x * stride.of[3];
          return images[at] / 127.5 - 1;
        });
        CHECK(error < out.tolerance() && !out.overrun(), "%s type=%d layout=%d width=%d: %g",
              kernels.isa, type, static_cast<int>(layout), static_cast<int>(size.of[3]), error);
      }
}
