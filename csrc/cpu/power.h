// 2^x of sixteen floats: AVX-512 only.
#pragma once

#include "vec.h"

namespace fd {
namespace {

// 2^floor(x) 2^f, f in [0, 1), 1 at 0: 9e-5 relative with degree 3, 1e-7 with 5. Overflow gives
// infinity, -inf gives 0, NaN stays NaN.
template <int degree>
FD_HOST_DEVICE __m512 power_of_2(__m512 x) {
  static_assert(degree == 3 || degree == 5, "fitted for these");
  constexpr float kCubic[] = {1.0f, 0.695116758f, 0.227644995f, 0.0770670399f};
  constexpr float kQuintic[] = {1.0f,          0.693151295f,  0.240164444f,
                                0.0557999127f, 0.00901703071f, 0.00186713005f};
  const float* k = degree == 3 ? kCubic : kQuintic;
  const __m512 f = _mm512_reduce_ps(x, 1);  // x - floor(x); 0 of an infinity
  __m512 value = _mm512_set1_ps(k[degree]);
  for (int i = degree - 1; i >= 0; --i) value = _mm512_fmadd_ps(value, f, _mm512_set1_ps(k[i]));
  return _mm512_scalef_ps(value, x);
}

}  // namespace
}  // namespace fd
