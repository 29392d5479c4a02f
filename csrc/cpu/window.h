// The pixels of a square of an image, zero where it reaches over the edges.
#pragma once

#include "vec.h"

namespace fd {
namespace {

// Where the tiles of some images are: `tile` pixels along each side, the last ones cut.
struct Tiles {
  int64_t tile, height, width;
  int64_t down = (height + tile - 1) / tile, across = (width + tile - 1) / tile;

  struct Place {
    int64_t sample, row, column;  // of a tile's first pixel
  };

  FD_MEMBER Place operator[](int64_t t) const {
    return {t / across / down, t / across % down * tile, t % across * tile};
  }
};

// side x side pixels whose first is (row, column) of an image of `height` x `width`, in which each
// pixel in memory stands `scale` times along both sides.
template <class T, int side>
struct Window {
  static constexpr int kPixels = side * side;

  const T* pixel[kPixels];
  int64_t moves[kPixels];  // all bits, or none: zeros stay where they are

  FD_MEMBER Window(const Operand& o, const Tiles::Place& at, int64_t height, int64_t width,
                   int64_t scale = 1) {
    alignas(64) static constexpr T zeros[kVec] = {};
    const T* const image = static_cast<const T*>(o.data) + at.sample * o.stride[0];
    for (int i = 0; i < kPixels; ++i) {
      const int64_t row = at.row + i / side, column = at.column + i % side;
      const bool inside = row >= 0 && row < height && column >= 0 && column < width;
      pixel[i] = inside ? image + row / scale * o.stride[2] + column / scale * o.stride[3] : zeros;
      moves[i] = -static_cast<int64_t>(inside);
    }
  }

  FD_MEMBER const T* at(int i, int64_t channel) const { return pixel[i] + (channel & moves[i]); }
};

}  // namespace
}  // namespace fd
