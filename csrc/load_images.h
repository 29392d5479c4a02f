// Images from uint8 memory as a network takes them; fastdiff/ops/load_images.py states the formula.
#pragma once

#include "tensor.h"

namespace fd {

struct LoadImages {
  Size size;              // of out: samples, channels, height, width
  const uint8_t* images;  // [count, channels, height - 2 pad, width - 2 pad]
  int64_t count;
  Size stride;           // of images
  const int64_t* index;  // [samples]
  const bool* flips;     // [samples], or null
  int64_t pad;
  Operand out;
};

FD_HOST_DEVICE float load_images_element(uint8_t u) {
  return (2.0f * static_cast<float>(u) - 255.0f) / 255.0f;
}

}  // namespace fd
