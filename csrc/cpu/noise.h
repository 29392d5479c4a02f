// Noise for a run of elements of one sample, in whole vectors: no element is made by other
// instructions than its neighbours, wherever the run begins and ends.
#pragma once

#include "../randn.h"
#include "lanes.h"

namespace fd {
namespace {

constexpr int kRun = 1024;                    // elements of a run
constexpr int kRunNoise = kRun + 8 * kLanes;  // and those made before and after it

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the halves of a word are read in order");
typedef uint32_t Half __attribute__((may_alias));

// The words of block j: even[2 j], odd[2 j], even[2 j + 1], odd[2 j + 1].
struct alignas(64) Words {
  Half even[kRunNoise / 2], odd[kRunNoise / 2];
  int pairs;  // how many of each
};

// The words of all blocks that have an element of the run.
FD_HOST_DEVICE void make_words(const Stream& stream, int64_t first, int count, Words& words) {
  const int blocks = static_cast<int>((first % 4 + count + 3) / 4);
  words.pairs = (blocks + kLanes - 1) / kLanes * kLanes * 2;
  Lanes block(static_cast<uint64_t>(first / 4));
  for (int i = 0; i < kLanes; ++i) block.part[i / kWidth][i % kWidth] += i;
  for (int pair = 0; pair < words.pairs; pair += 2 * kLanes) {
    const Block<Lanes> r = philox(stream, block);
    for (int k = 0; k < kParts; ++k) {
      const Part even = (r.word[0].part[k] & 0xffffffffu) | r.word[2].part[k] << 32;
      const Part odd = (r.word[1].part[k] & 0xffffffffu) | r.word[3].part[k] << 32;
      memcpy(words.even + pair + 2 * k * kWidth, &even, sizeof even);
      memcpy(words.odd + pair + 2 * k * kWidth, &odd, sizeof odd);
      block.part[k] += kLanes;
    }
  }
}

// Standard normals of elements first to first + count of the sample: an address within `out`.
FD_NOINLINE const float* make_noise(const Stream& stream, int64_t first, int count, float* out) {
  Words words;
  make_words(stream, first, count, words);
  const int pairs = words.pairs;
#pragma omp simd
  for (int i = 0; i < pairs; ++i) {
    const Pair z = normals(words.even[i], words.odd[i]);
    out[2 * i] = z.cos;
    out[2 * i + 1] = z.sin;
  }
  return out + first % 4;
}

// Likewise their words, as floats of the same bits.
FD_NOINLINE const float* make_bits(const Stream& stream, int64_t first, int count, float* out) {
  Words words;
  make_words(stream, first, count, words);
  for (int i = 0; i < words.pairs; ++i) {
    out[2 * i] = float_of(words.even[i]);
    out[2 * i + 1] = float_of(words.odd[i]);
  }
  return out + first % 4;
}

}  // namespace
}  // namespace fd
