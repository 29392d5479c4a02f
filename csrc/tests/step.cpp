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

// Two rows; t first, as COLUMNS. Row 1 has the next row's c_in of its own.
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

StepOutput expected(const Fields& f, unsigned has, int64_t s, int64_t e, const float* k,
                    uint32_t row, double& x_next, double& h_next) {
  const double x = f.x.get(s, e);
  double m = f.m.get(s, e);
  if (f.m_u) m = f.m_u->get(s, e) + (k[kW] + 1.0) * (m - f.m_u->get(s, e));
  const double r = f.v ? std::exp(k[kL] * f.v->get(s, e)) : 1.0;
  double D = std::fmin(std::fmax(k[kPx] * x + k[kPm] * m, -k[kClip]), k[kClip]);
  if (f.g) D += k[kQ] * r * r * f.g->get(s, e);
  x_next = k[kA] * x + k[kB] * D + k[kN] * m;
  if (f.h) x_next += k[kC] * f.h->get(s, e);
  if (has & kNoise)
    x_next += k[kS] * r * (f.z ? f.z->get(s, e) : normal64(kStreams + 2 * s, row, e));
  h_next = k[kD] * x + k[kE] * D;
  return {};
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
  const auto want = [&](bool history) {
    return [&, history](int64_t s, int64_t e) {
      double x_next, h_next;
      expected(f, has, s, e, k, row, x_next, h_next);
      return history ? h_next : x_next;
    };
  };
  const double error = f.x_next.error(want(false));
  const double h_error = f.h ? f.h_next.error(want(true)) : 0.0;
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

// NaN passes the clamp; without a limit, infinity does.
void check_special(const Kernels& kernels) {
  const int64_t row = 0;
  float table[kColumns] = {0, 1, 0, 1, 0, 1, 0, 0, 1};
  float x[3] = {NAN, INFINITY, -INFINITY}, m[3] = {0, 0, 0}, out[3];
  Step op = {{{1, 1, 1, 3}}, table, 1, &row, nullptr, 0, {x, DType::f32, {3, 0, 0, 1}},
             {m, DType::f32, {3, 0, 0, 1}}, {}, {}, {}, {}, {}, {out, DType::f32, {3, 0, 0, 1}},
             {}, {}};
  kernels.step(op);
  CHECK(std::isnan(out[0]) && std::isnan(out[1]) && std::isnan(out[2]), "a x is 0 inf");
  x[1] = 3;
  x[2] = -3;
  kernels.step(op);
  CHECK(std::isnan(out[0]) && out[1] == 1 && out[2] == -1, "%g %g %g", out[0], out[1], out[2]);
  table[kClip] = INFINITY;
  kernels.step(op);
  CHECK(std::isnan(out[0]) && out[1] == 3 && out[2] == -3, "%g %g %g", out[0], out[1], out[2]);
}

}  // namespace

void test_step(const Kernels& kernels) {
  for (unsigned has = 0; has <= kHasAll; ++has)
    for (const Size& size : kSizes)
      for (Layout layout : kLayouts)
        for (int dtype = 0; dtype < 3; ++dtype) {
          const unsigned i = has + dtype + static_cast<unsigned>(size.of[3]);
          check_step(kernels, size, has, has & kNoise && i % 3, static_cast<DType>(dtype), layout,
                     i % 3, i % 2);
        }
  for (float x = -110; x < 95; x += 0.0371f) {
    const double want = std::exp(static_cast<double>(x)), got = exponential(x);
    CHECK(std::abs(got - want) <= 1.5e-7 * want + 0x1p-149 || (std::isinf(got) && want > 3.402e38),
          "exp(%g)=%g", x, got);
  }
  check_alone(kernels);
  check_in_place(kernels);
  check_special(kernels);
}
