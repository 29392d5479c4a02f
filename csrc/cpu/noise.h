// Noise for a run of elements of one sample.
#pragma once

#include "../randn.h"
#include "lanes.h"

namespace fd {
namespace {

constexpr int kRun = 1024;                  // elements worked on at a time: all of it stays in L1
constexpr int kRunNoise = kRun + 8 * kLanes;  // whole blocks, and whole vectors of blocks

// The words of block j: even[2 j], odd[2 j], even[2 j + 1], odd[2 j + 1].
struct alignas(64) Words {
  uint64_t even[kRunNoise / 4], odd[kRunNoise / 4];
};

// The words of `count` blocks, rounded up to whole vectors.
FD_HOST_DEVICE void make_words(const Stream& stream, int64_t first, int count, Words& words) {
  const Stream shared = stream;
  Lanes block(first);
  for (int i = 0; i < kLanes; ++i) block.part[i / kWidth][i % kWidth] += i;
  for (int j = 0; j < count; j += kLanes) {
    const Block<Lanes> r = philox(shared, block);
    for (Part& part : block.part) part += kLanes;
    for (int k = 0; k < kParts; ++k) {
      const Part even = (r.word[0].part[k] & 0xffffffffu) | r.word[2].part[k] << 32;
      const Part odd = (r.word[1].part[k] & 0xffffffffu) | r.word[3].part[k] << 32;
      memcpy(words.even + j + k * kWidth, &even, sizeof even);
      memcpy(words.odd + j + k * kWidth, &odd, sizeof odd);
    }
  }
}

FD_HOST_DEVICE int blocks_of(int64_t first, int count) {
  return static_cast<int>((first % 4 + count + 3) / 4);
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the halves of a word are read in order");
typedef uint32_t Half __attribute__((may_alias));

// The words of elements first to first + count of the sample, as floats of the same bits: an
// address within `out`.
inline __attribute__((noinline)) const float* make_bits(const Stream& stream, int64_t first,
                                                        int count, float* out) {
  Words words;
  make_words(stream, first / 4, blocks_of(first, count), words);
  const Half* even = reinterpret_cast<const Half*>(words.even);
  const Half* odd = reinterpret_cast<const Half*>(words.odd);
  for (int i = 0; i < 2 * blocks_of(first, count); ++i) {
    memcpy(out + 2 * i, even + i, sizeof(Half));
    memcpy(out + 2 * i + 1, odd + i, sizeof(Half));
  }
  return out + first % 4;
}

// Standard normals of elements first to first + count of the sample: an address within `z`.
inline __attribute__((noinline)) const float* make_noise(const Stream& stream, int64_t first,
                                                         int count, float* z) {
  Words words;
  const int blocks = blocks_of(first, count);
  make_words(stream, first / 4, blocks, words);
  const Half* even = reinterpret_cast<const Half*>(words.even);
  const Half* odd = reinterpret_cast<const Half*>(words.odd);
  // Whole vectors, so that no element is computed by other instructions than its neighbours.
  const int pairs = (blocks + kLanes - 1) / kLanes * kLanes * 2;
#pragma omp simd
  for (int i = 0; i < pairs; ++i) {
    const Pair pair = normals(even[i], odd[i]);
    z[2 * i] = pair.cos;
    z[2 * i + 1] = pair.sin;
  }
  return z + first % 4;
}

}  // namespace
}  // namespace fd
