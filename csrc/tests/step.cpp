// The step against the formula in float64, for every set of operands.
#include "../step.h"

#include <memory>

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"
#include "noise.h"

namespace {

using namespace fd;

constexpr int64_t kStreams[] = {3, 4, (1ll << 35) + 3, 1, 7, 1ll << 33, 5, 6};

// Two rows of COLUMNS.
constexpr float kTable[2 * kColumns] = {
    9, 0.25f, 1.5f, 1.25f, -0.75f, 0.9f, 0.1f, 0.3f, 0.6f, -0.2f, 0.15f, 0.4f, 0.2f, 0.7f, -0.35f,
    5, 0.5f,  0.5f, 1.0f,  -1.25f, 0.5f, 0.2f, 0.2f, 0.8f, 0.3f,  0.25f, 0.6f, 0.9f, 0.1f, 0.45f};

struct Fields {
  std::unique_ptr<Field> m_u, v, g, h, z;
  Field x, m, x_next, h_next, input;

  Fields(const Size& size, unsigned has, bool streams, DType dtype, Layout layout, int copies)
      : x(size, DType::f32, layout, 1),
        m(size, dtype, layout, 2),
        x_next(size, DType::f32, layout),
        h_next(size, DType::f32, layout),
        input({{size.of[0] * copies, size.of[1], size.of[2], size.of[3]}}, dtype, layout) {
    const auto make = [&](unsigned flag, DType type, unsigned seed) {
      return std::unique_ptr<Field>(has & flag ? new Field(size, type, layout, seed) : nullptr);
    };
    m_u = make(kGuided, dtype, 3);
    v = make(kLearned, dtype, 4);
    g = make(kClassifier, DType::f32, 5);
    h = make(kHistory, DType::f32, 6);
    if (!streams) z = make(kNoise, DType::f32, 7);
  }
};

Operand of(const std::unique_ptr<Field>& field) { return field ? field->operand() : Operand{}; }

struct Expected {
  double x, h;
};

Expected expected(const Fields& f, unsigned has, int64_t s, int64_t e, const float* k,
                  uint32_t row) {
  const double x = f.x.get(s, e);
  double m = f.m.get(s, e);
  if (f.m_u) m = f.m_u->get(s, e) + (k[kW] + 1.0) * (m - f.m_u->get(s, e));
  const double r = f.v ? std::exp(k[kL] * f.v->get(s, e)) : 1.0;
  double D = std::fmin(std::fmax(k[kPx] * x + k[kPm] * m, -k[kClip]), k[kClip]);
  if (f.g) D += k[kQ] * r * r * f.g->get(s, e);
  double x_next = k[kA] * x + k[kB] * D + k[kN] * m;
  if (f.h) x_next += k[kC] * f.h->get(s, e);
  if (has & kNoise)
    x_next += k[kS] * r * (f.z ? f.z->get(s, e) : normal64(kStreams + 2 * s, row, e));
  return {x_next, k[kD] * x + k[kE] * D};
}

void check_step(const Kernels& kernels, const Size& size, unsigned has, bool streams,
                DType dtype, Layout layout, int copies, int64_t row) {
  Fields f(size, has, streams, dtype, layout, copies);
  Step op = {size,
             kTable,
             2,
             &row,
             streams ? kStreams : nullptr,
             copies,
             f.x.operand(),
             f.m.operand(),
             of(f.m_u),
             of(f.v),
             of(f.g),
             of(f.h),
             of(f.z),
             f.x_next.operand(),
             f.h ? f.h_next.operand() : Operand{},
             copies ? f.input.operand() : Operand{}};
  kernels.step(op);
  const float* k = kTable + row * kColumns;
  const auto want = [&](double Expected::*which) {
    return [&, which](int64_t s, int64_t e) { return expected(f, has, s, e, k, row).*which; };
  };
  const double error = f.x_next.error(want(&Expected::x));
  const double h_error = f.h ? f.h_next.error(want(&Expected::h)) : 0.0;
  const double input_error = f.input.error([&](int64_t s, int64_t e) {
    return kTable[kColumns + kCIn] * f.x_next.get(s % size.of[0], e);
  });
  CHECK(error < 2e-6 && h_error < 2e-6 && input_error <= f.input.tolerance() &&
            !f.x_next.overrun() && !f.h_next.overrun() && !f.input.overrun(),
        "%s has=%u dtype=%d layout=%d size=%dx%dx%dx%d: %g %g %g", kernels.isa, has,
        static_cast<int>(dtype), static_cast<int>(layout), static_cast<int>(size.of[0]),
        static_cast<int>(size.of[1]), static_cast<int>(size.of[2]), static_cast<int>(size.of[3]),
        error, h_error, input_error);
}

// A sample's result is the same bits at any place of any batch, on any number of threads.
void check_alone(const Kernels& kernels) {
  const Size size = {{4, 3, 61, 67}}, one = {{1, 3, 61, 67}};
  const int64_t row = 0;
  const unsigned all = kGuided | kLearned | kClassifier | kHistory | kNoise;
  Fields f(size, all, true, DType::f32, Layout::dense, 1);
  Step op = {size,       kTable,    2,         &row,      kStreams,  1,
             f.x.operand(), f.m.operand(), of(f.m_u), of(f.v), of(f.g), of(f.h), Operand{},
             f.x_next.operand(), f.h_next.operand(), f.input.operand()};
  kernels.step(op);
  op.size = one;
  op.streams += 2 * 2;
  Field alone(one, DType::f32, Layout::strided);
  for (Operand* o : {&op.x, &op.m, &op.m_u, &op.v, &op.g, &op.h, &op.h_next, &op.model_input})
    o->data = static_cast<float*>(o->data) + 2 * size.sample();
  op.x_next = alone.operand();
  kernels.step(op);
  alone.each([&](int64_t, int64_t e, int64_t) {
    CHECK(alone.get(0, e) == f.x_next.get(2, e), "%s element %d", kernels.isa,
          static_cast<int>(e));
  });
}

// x_next may be x, and h_next h.
void check_in_place(const Kernels& kernels) {
  const int64_t row = 1;
  for (Layout layout : kLayouts) {
    const Size size = {{2, 3, 5, 400}};
    Fields apart(size, kHistory | kNoise, true, DType::bf16, layout, 0);
    Step op = {size,          kTable,    2,         &row,      kStreams,  0,
               apart.x.operand(), apart.m.operand(), Operand{}, Operand{}, Operand{}, of(apart.h),
               Operand{}, apart.x_next.operand(), apart.h_next.operand(), Operand{}};
    kernels.step(op);
    op.x_next = op.x;
    op.h_next = op.h;
    kernels.step(op);
    const double error =
        apart.x.error([&](int64_t s, int64_t e) { return apart.x_next.get(s, e); }) +
        apart.h->error([&](int64_t s, int64_t e) { return apart.h_next.get(s, e); });
    CHECK(error == 0, "%s layout=%d: %g", kernels.isa, static_cast<int>(layout), error);
  }
}

}  // namespace

void test_functions() {
  for (float x = -110; x < 95; x += 0.0371f) {
    const double want = std::exp(static_cast<double>(x)), got = exponential(x);
    CHECK(std::abs(got - want) <= 1.5e-7 * want + 0x1p-149 || (std::isinf(got) && want > 3.402e38),
          "exp(%g)=%g", x, got);
  }
  CHECK(std::isnan(exponential(NAN)) && std::isnan(clamp(NAN, 1)), "NaN is lost");
  CHECK(clamp(3, 1) == 1 && clamp(-3, 1) == -1 && clamp(0.5f, 1) == 0.5f, "a limit of 1");
  CHECK(clamp(3, INFINITY) == 3 && std::isinf(clamp(-INFINITY, INFINITY)), "no limit");
}

void test_step(const Kernels& kernels) {
  for (unsigned has = 0; has <= kHasAll; ++has)
    for (const Size& size : kSizes)
      for (Layout layout : kLayouts)
        for (int dtype = 0; dtype < 3; ++dtype) {
          const unsigned i = has + dtype + static_cast<unsigned>(size.of[3]);
          check_step(kernels, size, has, has & kNoise && i % 3, static_cast<DType>(dtype), layout,
                     i % 3, i % 2);
        }
  check_alone(kernels);
  check_in_place(kernels);
}
