// Products of a few rows with a panel of 32 columns, all sums in registers.
#pragma once

#include <algorithm>

#include "vec.h"

namespace fd {
namespace {

constexpr int kPanel = 32;  // columns
// Rows at most, and vectors of columns at a time, by how many registers there are for their sums.
#if defined(__AVX512F__)
constexpr int kRows = 8, kTogether = 2;
#else
constexpr int kRows = 6, kTogether = 1;
#endif

// What is to come to L1 meanwhile: some bytes at each step through the depth, at least a line.
struct Ahead {
  const char* at;
  int64_t step;

  FD_MEMBER void fetch() {
    __builtin_prefetch(at);
    __builtin_prefetch(at + 64);
    at += step;
  }
};

// What becomes of a row's sums, from some column on: c[row][32] is set to them, or they are added.
struct Keep {
  float* c;
  bool add;

  template <int count>
  FD_BF16 FD_MEMBER void operator()(int64_t row, int column, const Vec (&sum)[count]) const {
    float* const to = c + row * kPanel + column;
    for (int n = 0; n < count; ++n)
      store(to + n * kVec, add ? load(to + n * kVec) + sum[n] : sum[n]);
  }
};

// Terms that are summed before their sum joins the whole. In float32 this is for the rounding
// error, which grows with the square root of their number.
template <class T>
constexpr int64_t kTerms = sizeof(T) == 4 ? 32 : 256;

// a[rows][depth] b[depth][32], given to `finish` as rows from `row` on. In a, rows are `stride`
// apart and the terms of a sum `along`. Nothing of it needs the target, but `finish` has to have
// the same.
template <int rows, int along = 1, class Finish>
FD_BF16 inline void multiply_rows(const float* a, int64_t stride, const float* b, int64_t depth,
                                  const Finish& finish, int64_t row, Ahead ahead) {
  for (int half = 0; half < 2; half += kTogether) {
    Vec sum[rows][kTogether];
    FD_UNROLL(8)
    for (int r = 0; r < rows; ++r)
      for (Vec& s : sum[r]) s = zeros();
    FD_UNROLL(2)
    for (int64_t k = 0; k < depth; ++k) {
      if (half == 0) ahead.fetch();
      Vec right[kTogether];
      for (int n = 0; n < kTogether; ++n) right[n] = load(b + k * kPanel + (half + n) * kVec);
      FD_UNROLL(8)
      for (int r = 0; r < rows; ++r) {
        const Vec left = every(a[r * stride + k * along]);
        for (int n = 0; n < kTogether; ++n) sum[r][n] = fma(left, right[n], sum[r][n]);
      }
    }
    FD_UNROLL(8)
    for (int r = 0; r < rows; ++r) finish(row + r, half * kVec, sum[r]);
  }
}

#if defined(__AVX512F__)
// The same in bfloat16, summed in float32. Neighbours of the depth are paired, in a too, whatever
// `along` is: b[depth / 2][32][2].
template <int rows, int along = 1, class Finish>
FD_BF16 inline void multiply_rows(const uint16_t* a, int64_t stride, const uint16_t* b,
                                  int64_t depth, const Finish& finish, int64_t row,
                                  Ahead ahead) {
  Vec sum[rows][2];
  FD_UNROLL(8)
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = zeros();
  FD_UNROLL(2)
  for (int64_t k = 0; k < depth; k += 2) {
    ahead.fetch();
    const __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * kPanel);
    const __m512bh right = (__m512bh)_mm512_loadu_si512(b + k * kPanel + 2 * kVec);
    FD_UNROLL(8)
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      memcpy(&pair, a + r * stride + k * along, sizeof pair);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      sum[r][0].v = _mm512_dpbf16_ps(sum[r][0].v, value, left);
      sum[r][1].v = _mm512_dpbf16_ps(sum[r][1].v, value, right);
    }
  }
  FD_UNROLL(8)
  for (int r = 0; r < rows; ++r) finish(row + r, 0, sum[r]);
}
#endif

// The same for any number of rows. The bits of a sum do not depend on how the rows are cut.
template <class T, class Finish>
inline void multiply(int64_t rows, const T* a, int64_t stride, const T* b, int64_t depth,
                     const Finish& finish, int64_t row = 0) {
  // The panel comes from L3 in one stream, which the hardware follows only within a page of 4 KB.
  // Each group of rows fetches its share of what follows this part of it.
  constexpr int64_t width = kPanel * 4, near = 8192;  // bytes of a step, in L1
  const int64_t groups = (rows + kRows - 1) / kRows, part = depth * kPanel * sizeof(T);
  Ahead ahead = {reinterpret_cast<const char*>(b) + (groups > 1 ? std::max(part, near) : near),
                 width};
  while (ahead.step / 2 * groups >= width) ahead.step /= 2;
  for (; rows >= kRows; rows -= kRows, row += kRows, a += kRows * stride) {
    multiply_rows<kRows>(a, stride, b, depth, finish, row, ahead);
    ahead.at += part / width * ahead.step;
  }
  switch (rows) {
#if defined(__AVX512F__)
    case 7: return multiply_rows<7>(a, stride, b, depth, finish, row, ahead);
    case 6: return multiply_rows<6>(a, stride, b, depth, finish, row, ahead);
#endif
    case 5: return multiply_rows<5>(a, stride, b, depth, finish, row, ahead);
    case 4: return multiply_rows<4>(a, stride, b, depth, finish, row, ahead);
    case 3: return multiply_rows<3>(a, stride, b, depth, finish, row, ahead);
    case 2: return multiply_rows<2>(a, stride, b, depth, finish, row, ahead);
    case 1: return multiply_rows<1>(a, stride, b, depth, finish, row, ahead);
  }
}

}  // namespace
}  // namespace fd
