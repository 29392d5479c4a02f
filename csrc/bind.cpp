// The module fastdiff._C: addresses, sizes and strides as Python integers. The launchers of
// fastdiff/ops/*.py make the calls, after the checks of the public functions.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using namespace fd;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& active() {
  static const Kernels& chosen = kernels(std::getenv("FASTDIFF_ISA"));
  return chosen;
}

Size size_of(const py::tuple& size) {
  Size of;
  for (int d = 0; d < 4; ++d) of.of[d] = size[d].cast<int64_t>();
  return of;
}

// (address, dtype code, four strides) or None, as describe() of fastdiff/ops/layout.py gives them.
Operand operand(const py::handle& described) {
  Operand o;
  if (described.is_none()) return o;
  const auto parts = py::reinterpret_borrow<py::tuple>(described);
  const auto strides = py::reinterpret_borrow<py::tuple>(parts[2]);
  o.data = pointer<void>(parts[0].cast<int64_t>());
  o.dtype = static_cast<DType>(parts[1].cast<int>());
  for (int d = 0; d < 4; ++d) o.stride[d] = strides[d].cast<int64_t>();
  return o;
}

Operand dense(int64_t address, DType dtype, int64_t elements) {
  return {pointer<void>(address), dtype, {elements, 0, 0, 1}};
}

// Other Python threads run meanwhile, where that is worth giving the lock away and back.
class Unlocked {
 public:
  explicit Unlocked(int64_t elements) {
    if (elements >= kLarge) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

void check_row(int64_t row, int64_t rows) {
  if (row < 0 || row >= rows)
    throw py::value_error("row=" + std::to_string(row) + ": must be in [0, " +
                          std::to_string(rows) + "), the table's rows");
}

void run_step(const Step& op) {
  check_row(*op.row, op.rows);
  const Unlocked unlocked(op.size.all());
  active().step(op);
}

void step(int64_t table, int64_t rows, int64_t row, int64_t streams, int64_t copies,
          const py::tuple& size, const py::list& o) {
  run_step({size_of(size), pointer<const float>(table), rows, pointer<const int64_t>(row),
            pointer<const int64_t>(streams), copies, operand(o[0]), operand(o[1]), operand(o[2]),
            operand(o[3]), operand(o[4]), operand(o[5]), operand(o[6]), operand(o[7]),
            operand(o[8]), operand(o[9])});
}

// As step, of contiguous tensors; 0 is the address of an absent one. The dtype is the model's.
void step_dense(int64_t samples, int64_t all, int64_t table, int64_t rows, int64_t row,
                int64_t streams, int64_t copies, int dtype, int64_t x, int64_t m, int64_t m_u,
                int64_t v, int64_t g, int64_t h, int64_t z, int64_t x_next, int64_t h_next,
                int64_t model_input) {
  const int64_t elements = samples ? all / samples : 0;
  const auto state = [&](int64_t address) { return dense(address, DType::f32, elements); };
  const auto model = [&](int64_t address) {
    return dense(address, static_cast<DType>(dtype), elements);
  };
  run_step({{{samples, 1, 1, elements}}, pointer<const float>(table), rows,
            pointer<const int64_t>(row), pointer<const int64_t>(streams), copies, state(x),
            model(m), model(m_u), model(v), state(g), state(h), state(z), state(x_next),
            state(h_next), model(model_input)});
}

void noising(int64_t t, int64_t table, int64_t rows, int64_t streams, uint32_t row,
             const py::tuple& size, const py::list& o) {
  const Noising op = {size_of(size),    pointer<const int64_t>(t),       pointer<const float>(table),
                      rows,             pointer<const int64_t>(streams), row,
                      operand(o[0]),    operand(o[1]),                   operand(o[2]),
                      operand(o[3])};
  for (int64_t sample = 0; sample < op.size.of[0]; ++sample) {
    const int64_t at = op.t[sample];
    if (at < 0 || at >= rows)
      throw py::value_error("t=" + std::to_string(at) + ": must be in [0, " +
                            std::to_string(rows) + "), the table's rows");
  }
  const Unlocked unlocked(op.size.all());
  active().noising(op);
}

void cfg(int64_t weights, double w, const py::tuple& size, const py::list& o) {
  const Cfg op = {size_of(size), pointer<const float>(weights), static_cast<float>(w),
                  operand(o[0]), operand(o[1]), operand(o[2])};
  const Unlocked unlocked(op.size.all());
  active().cfg(op);
}

void randn(int64_t samples, int64_t elements, int64_t streams, uint32_t row, bool bits,
           int64_t out) {
  const Unlocked unlocked(samples * elements);
  active().randn({samples, elements, pointer<const int64_t>(streams), row, bits,
                  pointer<void>(out)});
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastdiff's CPU kernels";
  active();
  module.def("isa", [] { return active().isa; }, "The instruction set picked for this machine.");
  module.def("threaded", &has_threads, "Whether an OpenMP runtime was found in the process.");
  module.def("step", &step);
  module.def("step_dense", &step_dense);
  module.def("noising", &noising);
  module.def("cfg", &cfg);
  module.def("randn", &randn);
}
