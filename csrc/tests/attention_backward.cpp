// Attention's gradient against its formula in float64: blocks of less, just and more than whole,
// and heads that are cut by their keys and that are not.
#include "../attention.h"

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

namespace {

using namespace fd;

struct Shape {
  int64_t batch, heads, queries, keys, size;
};

constexpr Shape kShapes[] = {{1, 1, 1, 2, 8},     {2, 2, 9, 31, 40},  {1, 2, 33, 128, 64},
                             {1, 1, 258, 131, 24}, {2, 9, 7, 130, 16}, {1, 1, 35, 259, 512}};

using Numbers = std::vector<double>;

void check(const Kernels& kernels, const Shape& n, DType dtype, float scale) {
  const Size size = {{n.batch, n.heads, n.queries, n.size}};
  const Size keys = {{n.batch, n.heads, n.keys, n.size}};
  Field q(size, dtype, Layout::gaps, 1), k(keys, dtype, Layout::dense, 2);
  Field v(keys, dtype, Layout::gaps, 3), grad(size, dtype, Layout::gaps, 4);
  Field out(size, dtype, Layout::dense), grad_q(size, dtype, Layout::gaps);
  Field grad_k(keys, dtype, Layout::gaps), grad_v(keys, dtype, Layout::dense);
  const int64_t per_sample = n.heads * n.queries;
  std::vector<float> lse(n.batch * per_sample + 1, NAN);
  const Attention forward = {n.batch, n.heads, n.queries, n.keys, n.size, scale, q.operand(),
                             k.operand(), v.operand(), out.operand(), lse.data()};
  kernels.attention(forward);
  kernels.attention_backward({forward, grad.operand(), grad_q.operand(), grad_k.operand(),
                              grad_v.operand()});

  Numbers want_q(n.batch * per_sample * n.size), want_k(n.batch * n.heads * n.keys * n.size);
  Numbers want_v(want_k.size());
  double lse_error = 0;
  for (int64_t b = 0; b < n.batch; ++b)
    for (int64_t row = 0; row < per_sample; ++row) {
      const int64_t key0 = row / n.queries * n.keys;
      const auto dot = [&](const Field& x, int64_t i, const Field& y, int64_t j) {
        double sum = 0;
        for (int64_t d = 0; d < n.size; ++d)
          sum += x.get(b, i * n.size + d) * y.get(b, j * n.size + d);
        return sum;
      };
      Numbers p(n.keys), dp(n.keys);
      double most = -INFINITY, sum = 0, mean = 0;
      for (int64_t key = 0; key < n.keys; ++key) {
        most = std::fmax(most, p[key] = scale * dot(q, row, k, key0 + key));
        dp[key] = dot(grad, row, v, key0 + key);
      }
      for (double& w : p) sum += w = std::exp(w - most);
      for (int64_t key = 0; key < n.keys; ++key) mean += (p[key] /= sum) * dp[key];
      lse_error = std::fmax(lse_error, std::abs(lse[b * per_sample + row] - most - std::log(sum)));
      for (int64_t key = 0; key < n.keys; ++key)
        for (int64_t d = 0; d < n.size; ++d) {
          const int64_t here = row * n.size + d, there = (key0 + key) * n.size + d;
          const double ds = scale * p[key] * (dp[key] - mean);
          const int64_t of_keys = b * n.heads * n.keys * n.size + there;
          want_q[b * per_sample * n.size + here] += ds * k.get(b, there);
          want_k[of_keys] += ds * q.get(b, here);
          want_v[of_keys] += p[key] * grad.get(b, here);
        }
    }
  const auto error = [&](const Field& got, const Numbers& want) {
    const int64_t of_sample = static_cast<int64_t>(want.size()) / n.batch;
    return got.error([&](int64_t b, int64_t e) { return want[b * of_sample + e]; });
  };
  const double errors[] = {error(grad_q, want_q), error(grad_k, want_k), error(grad_v, want_v)};
  // bfloat16: p, ds and `out` were rounded, in sums that cancel
  const double allowed = dtype == DType::f32 ? 2e-5 : 0.03;
  CHECK(errors[0] < allowed && errors[1] < allowed && errors[2] < allowed && lse_error < 1e-5,
        "%s dtype=%d queries=%d keys=%d size=%d scale=%g: %g %g %g, lse %g", kernels.isa,
        static_cast<int>(dtype), static_cast<int>(n.queries), static_cast<int>(n.keys),
        static_cast<int>(n.size), scale, errors[0], errors[1], errors[2], lse_error);
  CHECK(!grad_q.overrun() && !grad_k.overrun() && !grad_v.overrun() && std::isnan(lse.back()),
        "%s dtype=%d queries=%d keys=%d size=%d: overrun", kernels.isa, static_cast<int>(dtype),
        static_cast<int>(n.queries), static_cast<int>(n.keys), static_cast<int>(n.size));
}

}  // namespace

void test_attention_backward(const Kernels& kernels) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    if (!kernels.attention_runs(dtype)) continue;
    for (const Shape& shape : kShapes)
      for (float sharp : {0.4f, 2.0f})
        check(kernels, shape, dtype, sharp / std::sqrt(static_cast<float>(shape.size)));
  }
}
