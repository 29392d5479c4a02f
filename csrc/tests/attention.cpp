// Attention against its formula in float64: tokens and keys of less, just and more than a block.
#include "../attention.h"

#include <algorithm>

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

namespace {

using namespace fd;

struct Shape {
  int64_t batch, heads, queries, keys, size;
};

constexpr Shape kShapes[] = {{1, 1, 1, 1, 8},    {2, 2, 9, 31, 40},   {1, 2, 8, 33, 64},
                             {1, 1, 65, 515, 32}, {1, 1, 17, 259, 136}, {1, 1, 9, 130, 512},
                             {1, 3, 70, 64, 80}};

// The output of one query.
std::vector<double> expected(const Field& q, const Field& k, const Field& v, const Shape& n,
                             int64_t batch, int64_t head, int64_t query, double scale) {
  const auto at = [&](int64_t tokens, int64_t token, int64_t d) {
    return (head * tokens + token) * n.size + d;
  };
  std::vector<double> weight(n.keys), out(n.size);
  double most = -INFINITY, sum = 0;
  for (int64_t key = 0; key < n.keys; ++key) {
    for (int64_t d = 0; d < n.size; ++d)
      weight[key] +=
          scale * q.get(batch, at(n.queries, query, d)) * k.get(batch, at(n.keys, key, d));
    most = std::max(most, weight[key]);
  }
  for (double& w : weight) sum += w = std::exp(w - most);
  for (int64_t key = 0; key < n.keys; ++key)
    for (int64_t d = 0; d < n.size; ++d)
      out[d] += weight[key] / sum * v.get(batch, at(n.keys, key, d));
  return out;
}

void check(const Kernels& kernels, const Shape& n, DType dtype, float scale) {
  const Size size = {{n.batch, n.heads, n.queries, n.size}};
  const Size keys = {{n.batch, n.heads, n.keys, n.size}};
  Field q(size, dtype, Layout::gaps, 1), k(keys, dtype, Layout::dense, 2);
  Field v(keys, dtype, Layout::gaps, 3), out(size, dtype, Layout::gaps);
  kernels.attention({n.batch, n.heads, n.queries, n.keys, n.size, scale, q.operand(), k.operand(),
                     v.operand(), out.operand()});
  std::vector<double> want;
  int64_t of_batch = -1, of_row = -1;
  const double error = out.error([&](int64_t batch, int64_t e) {
    const int64_t row = e / n.size;
    if (batch != of_batch || row != of_row)
      want = expected(q, k, v, n, of_batch = batch, (of_row = row) / n.queries, row % n.queries,
                      scale);
    return want[e % n.size];
  });
  // A rounding error of a logit, which grows with the scale, is a relative one of its weight.
  CHECK(error < (dtype == DType::f32 ? 4e-6 * (1 + scale) : 0x1p-7) && !out.overrun(),
        "%s dtype=%d queries=%d keys=%d size=%d scale=%g: %g", kernels.isa,
        static_cast<int>(dtype), static_cast<int>(n.queries), static_cast<int>(n.keys),
        static_cast<int>(n.size), scale, error);
}

// What is no number in a query stays in its row, in a value in its column.
void check_special(const Kernels& kernels) {
  const Size size = {{1, 1, 20, 8}};
  Field q(size, DType::f32, Layout::dense, 1), k(size, DType::f32, Layout::dense, 2);
  Field v(size, DType::f32, Layout::dense, 3), out(size, DType::f32, Layout::dense);
  static_cast<float*>(q.operand().data)[5 * 8 + 3] = NAN;
  static_cast<float*>(v.operand().data)[7 * 8 + 2] = INFINITY;
  kernels.attention({1, 1, 20, 20, 8, 1, q.operand(), k.operand(), v.operand(), out.operand()});
  out.each([&](int64_t, int64_t e, int64_t) {
    const double got = out.get(0, e);
    if (e / 8 == 5)
      CHECK(std::isnan(got), "%s: row of NaN: %g", kernels.isa, got);
    else
      CHECK(e % 8 == 2 ? got == INFINITY : std::isfinite(got), "%s: %d: %g", kernels.isa,
            static_cast<int>(e), got);
  });
}

}  // namespace

void test_attention(const Kernels& kernels) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    if (!kernels.attention_runs(dtype)) continue;
    for (const Shape& shape : kShapes)
      for (float scale : {0.1f, 8.0f}) check(kernels, shape, dtype, scale);
    if (dtype == DType::f32) check_special(kernels);
  }
}
