#include "../load_images.h"

#include "kernels.h"
#include "parallel.h"

namespace fd {
namespace FD_ISA {
namespace {

FD_HOST_DEVICE float same(float x) { return x; }

template <class T, T encode(float)>
inline void copy(const uint8_t* from, int64_t from_step, T* to, int64_t to_step, int64_t count) {
  if (from_step == 1 && to_step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = encode(load_images_element(from[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      to[i * to_step] = encode(load_images_element(from[i * from_step]));
  }
}

template <class T, T encode(float)>
inline void load(const LoadImages& op, int64_t sample) {
  const int64_t channels = op.size.of[1], height = op.size.of[2], width = op.size.of[3];
  const int64_t pad = op.pad, inside = width - 2 * pad, step = op.out.stride[3];
  const bool flipped = op.flips && op.flips[sample];
  const uint8_t* image = op.images + op.index[sample] * op.stride.of[0];
  if (flipped) image += (inside - 1) * op.stride.of[3];
  const int64_t from_step = flipped ? -op.stride.of[3] : op.stride.of[3];
  const T black = encode(load_images_element(0));
  const auto blacken = [&](T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i * step] = black;
  };
  // a channels-last image is written row by row, any other plane by plane
  const bool by_row = op.out.stride[1] < op.out.stride[2];
  for (int64_t i = 0; i < channels * height; ++i) {
    const int64_t c = by_row ? i % channels : i / height, y = by_row ? i / channels : i % height;
    T* to = static_cast<T*>(op.out.data) + sample * op.out.stride[0] + c * op.out.stride[1] +
            y * op.out.stride[2];
    if (y < pad || y >= height - pad) {
      blacken(to, width);
      continue;
    }
    blacken(to, pad);
    copy<T, encode>(image + c * op.stride.of[1] + (y - pad) * op.stride.of[2], from_step,
                    to + pad * step, step, inside);
    blacken(to + (pad + inside) * step, pad);
  }
}

}  // namespace

void load_images(LoadImages op) {
  for_each(op.size.of[0], op.size.all() >= kLarge, [&](int64_t sample) {
    if (op.out.dtype == DType::bf16)
      load<uint16_t, to_bf16>(op, sample);
    else if (op.out.dtype == DType::f16)
      load<uint16_t, to_f16>(op, sample);
    else
      load<float, same>(op, sample);
  });
}

}  // namespace FD_ISA
}  // namespace fd
