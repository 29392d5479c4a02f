// Philox against the known answers of its authors, normals against float64.
#include "../randn.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/kernels.h"
#include "check.h"
#include "noise.h"

// Random123's kat_vectors, philox4x32 of 10 rounds: counter, key, words.
constexpr uint32_t kKnown[][10] = {
    {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
    {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
    {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
     0x94fdcceb, 0x5001e420, 0x24126ea1},
};

void test_words() {
  for (const auto& k : kKnown) {
    const fd::Stream stream = {k[1], {k[2], k[3]}, {k[4], k[5]}};
    const auto block = fd::philox<uint64_t>(stream, k[0]);
    for (int i = 0; i < 4; ++i)
      CHECK(static_cast<uint32_t>(block.word[i]) == k[6 + i], "word %d of %08x", i, k[0]);
  }
}

static double normals_error(uint32_t r0, uint32_t r1) {
  const fd::Pair z = fd::normals(r0, r1);
  double want[2];
  fd::normals64(r0, r1, want);
  return std::max(std::abs(z.cos - want[0]), std::abs(z.sin - want[1]));
}

void test_normals() {
  double worst = 0;
  uint32_t a = 1, b = 2;
  for (int i = 0; i < 5000000; ++i) {
    a = a * 1664525u + 1013904223u;
    b = b * 22695477u + a;
    worst = std::max(worst, normals_error(a, b));
  }
  CHECK(worst < 1e-6, "random words: %g", worst);
  // Both ends of the radius, and both sides of each quadrant's boundaries.
  for (uint32_t near = 0; near < 300; ++near)
    for (uint32_t r0 : {near, ~near, near << 7, ~(near << 7), near << 23})
      for (uint32_t eighth = 0; eighth < 8; ++eighth)
        for (uint32_t off : {0u, 1u, ~0u, near << 20})
          worst = std::max(worst, normals_error(r0, (eighth << 29) + off));
  CHECK(worst < 1e-6, "ends: %g", worst);
}

void test_randn(const fd::Kernels& kernels) {
  const int64_t streams[] = {(1ll << 40) + 7, 3, 5, (1ll << 33) + 1, 0, 0};
  for (int64_t elements : {1, 3, 63, 1024, 1025, 20001}) {  // the last runs on several threads
    const int64_t all = 3 * elements;
    std::vector<uint32_t> out(all + 2, 0xabcd), z(all + 2, 0xabcd);
    kernels.randn({3, elements, streams, 9, true, out.data() + 1});
    kernels.randn({3, elements, streams, 9, false, z.data() + 1});
    for (const auto& v : {out, z}) CHECK(v[0] == 0xabcd && v[all + 1] == 0xabcd, "overrun");
    double worst = 0;
    for (int64_t i = 0; i < all; ++i) {
      const int64_t *stream = streams + 2 * (i / elements), e = i % elements;
      CHECK(out[i + 1] == fd::word(stream, 9, e), "bits of element %d", static_cast<int>(i));
      worst = std::max(worst, std::abs(fd::float_of(z[i + 1]) - fd::normal64(stream, 9, e)));
    }
    CHECK(worst < 1e-6, "%s: %g", kernels.isa, worst);
  }
}
