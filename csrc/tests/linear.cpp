// Rows times a matrix against the sum in float64: rows of less, just and more than is done at once.
#include "../linear.h"

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

namespace {

using namespace fd;

struct Shape {
  int64_t samples, rows, inputs, outputs;
};

constexpr Shape kShapes[] = {{1, 1, 16, 32},   {3, 7, 48, 96},  {2, 33, 80, 64},
                             {1, 301, 336, 64}, {1, 70, 528, 32}, {2, 300, 16, 32}, {0, 4, 16, 32}};

void check(const Kernels& kernels, const Shape& n, DType dtype, Layout layout, bool whole) {
  const Size in = {{n.samples, 1, n.rows, n.inputs}}, to = {{n.samples, 1, n.rows, n.outputs}};
  Field x(in, dtype, layout, 1), residual(to, dtype, Layout::gaps, 2), out(to, dtype, layout);
  Field weight({{1, 1, n.outputs, n.inputs}}, dtype, Layout::dense, 3);
  Field bias({{1, 1, 1, n.outputs}}, DType::f32, Layout::dense, 4);
  std::vector<float> wide(n.outputs * n.inputs);
  std::vector<uint16_t> narrow(wide.size());
  for (int64_t k = 0; k < n.outputs; ++k)
    for (int64_t c = 0; c < n.inputs; ++c) {
      const auto value = static_cast<float>(weight.get(0, k * n.inputs + c));
      const int64_t panel = k / 32 * n.inputs;
      wide[(panel + c) * 32 + k % 32] = value;
      narrow[(panel + c / 2 * 2) * 32 + k % 32 * 2 + c % 2] = to_bf16(value);
    }
  const void* packed = wide.data();
  if (dtype == DType::bf16) packed = narrow.data();
  const auto by_row = [](Field& field) {
    Operand o = field.operand();
    o.stride[1] = o.stride[2];
    return o;
  };
  kernels.linear({n.samples, n.rows, n.inputs, n.outputs, dtype, packed,
                  whole ? static_cast<float*>(bias.operand().data) : nullptr, by_row(x),
                  whole ? by_row(residual) : Operand{}, by_row(out)});
  const double error = out.error([&](int64_t s, int64_t e) {
    const int64_t row = e / n.outputs, k = e % n.outputs;
    double sum = whole ? bias.get(0, k) + residual.get(s, e) : 0;
    for (int64_t c = 0; c < n.inputs; ++c)
      sum += weight.get(0, k * n.inputs + c) * x.get(s, row * n.inputs + c);
    return sum;
  });
  // Relative to 1 + |sum|, while the terms that cancel in it sum to about sqrt(inputs).
  CHECK(error < (dtype == DType::f32 ? 1e-6 * std::sqrt(n.inputs) : 0x1p-8) && !out.overrun(),
        "%s dtype=%d rows=%d inputs=%d layout=%d whole=%d: %g", kernels.isa,
        static_cast<int>(dtype), static_cast<int>(n.rows), static_cast<int>(n.inputs),
        static_cast<int>(layout), whole, error);
}

}  // namespace

void test_linear(const Kernels& kernels) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    if (!kernels.linear_runs(dtype)) continue;
    for (const Shape& shape : kShapes)
      for (Layout layout : {Layout::dense, Layout::gaps})
        for (bool whole : {false, true}) check(kernels, shape, dtype, layout, whole);
  }
}
