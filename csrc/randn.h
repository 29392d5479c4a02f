// Counter-based normal noise: Philox-4x32-10 (Salmon et al. 2011) and the Box-Muller transform.
// fastdiff/ops/randn.py states what is computed, kernels/philox.py computes the same for Triton.
#pragma once

#include "exponential.h"

namespace fd {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // added to the key each round
constexpr int kPhiloxRounds = 10;

struct Randn {
  int64_t samples, elements;
  const int64_t* streams;  // [samples, 2]: seed, index
  uint32_t row;
  bool bits;
  void* out;  // [samples, elements], contiguous: uint32_t for bits, else float
};

// What the words of one sample and row share: they differ in the first counter word alone.
struct Stream {
  uint32_t row, index[2], seed[2];
};

FD_HOST_DEVICE Stream stream_of(const int64_t* seed_index, uint32_t row) {
  const uint64_t seed = static_cast<uint64_t>(seed_index[0]);
  const uint64_t index = static_cast<uint64_t>(seed_index[1]);
  return {row,
          {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)},
          {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}};
}

// The coefficients below were fitted to the least largest error, each rounded to float32 in turn;
// the error of the polynomial alone is given.

// Q of -2 ln(1 + f) = -2 f + f^2 Q(f), f in [sqrt(1/2) - 1, sqrt(2) - 1]: 6e-9 relative. Even and
// odd powers apart, since one after the other they would take twice as long.
FD_HOST_DEVICE float log_tail(float f, float f2) {
  const float even = polynomial(f2, 1.0f, 0.500016391f, 0.332468241f, 0.263190746f, 0.152737886f);
  const float odd = polynomial(f2, -0.666666627f, -0.400024861f, -0.284030885f, -0.255248576f);
  return FD_FMA(odd, f, even);
}

// sin(pi a / 4), |a| <= 1: 2e-8 relative.
FD_HOST_DEVICE float sin_eighth(float a) {
  return a * polynomial(a * a, 0.785398185f, -0.0807458386f, 0.0024910483f, -3.66352797e-05f);
}

// cos(pi a / 4), |a| <= 1: 4e-10.
FD_HOST_DEVICE float cos_eighth(float a) {
  return polynomial(a * a, 1.0f, -0.308425128f, 0.0158542823f, -0.000325862668f, 3.48964454e-06f);
}

constexpr float kMinusTwoLn2 = -1.38629436f;
constexpr uint32_t kSqrtHalf = 0x3f3504f3u;  // the bits of sqrt(1/2)

// sqrt(-2 ln u), u = float32(r) 2^-32 + 2^-33.
FD_HOST_DEVICE float radius(uint32_t r) {
  const float u = FD_FMA(static_cast<float>(r), 0x1p-32f, 0x1p-33f);
  // u = 2^e (1 + f), with f nearest to 0, so that nothing cancels near u = 1
  const int32_t e = static_cast<int32_t>(bits_of(u) - kSqrtHalf) >> 23;
  const float f = float_of(bits_of(u) - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  const float f2 = f * f;
  const float line = FD_FMA(static_cast<float>(e), kMinusTwoLn2, -2.0f * f);
  return __builtin_sqrtf(FD_FMA(log_tail(f, f2), f2, line));
}

struct Pair {
  float cos, sin;
};

// (cos, sin)(2 pi r 2^-32): the quadrant and the rest a, in eighths of a turn, are exact.
FD_HOST_DEVICE Pair direction(uint32_t r) {
  const uint32_t quadrant = r + 0x20000000u;  // its two upper bits
  const float a = static_cast<float>(static_cast<int32_t>(r << 2)) * 0x1p-31f;
  const uint32_t sine = bits_of(sin_eighth(a)), cosine = bits_of(cos_eighth(a));
  const bool swap = quadrant & 0x40000000u;
  const uint32_t x = swap ? sine : cosine, y = swap ? cosine : sine;
  return {float_of(x ^ ((quadrant ^ quadrant << 1) & 0x80000000u)),
          float_of(y ^ (quadrant & 0x80000000u))};
}

FD_HOST_DEVICE Pair normals(uint32_t r0, uint32_t r1) {
  const float length = radius(r0);
  const Pair z = direction(r1);
  return {length * z.cos, length * z.sin};
}

FD_HOST_DEVICE uint64_t product(uint64_t a, uint32_t b) { return (a & 0xffffffffu) * b; }

// Four words, each in the low half of a Word: uint64_t, or a vector of them. A product of two words
// needs no shuffles then; the upper halves are left over from the products.
template <class Word>
struct Block {
  Word word[4];
};

// The words of elements 4 block to 4 block + 3.
template <class Word>
FD_HOST_DEVICE Block<Word> philox(const Stream& stream, Word block) {
  Word c0 = block, c1 = Word(stream.row);
  Word c2 = Word(stream.index[0]), c3 = Word(stream.index[1]);
  uint32_t k0 = stream.seed[0], k1 = stream.seed[1];
  FD_UNROLL(10)
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Word p0 = product(c0, kPhiloxM0);
    const Word p1 = product(c2, kPhiloxM1);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fd
