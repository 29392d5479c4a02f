// The module fastdiff._C: the CPU kernels.
#include <cstdlib>
#include <optional>
#include <string>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace {

using namespace fd;

const Kernels& active() {
  static const Kernels& chosen = kernels(std::getenv("FASTDIFF_ISA"));
  return chosen;
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

void check_in_table(const char* name, int64_t row, int64_t rows) {
  if (row < 0 || row >= rows)
    throw py::value_error(name + ("=" + std::to_string(row)) + ": must be in [0, " +
                          std::to_string(rows) + "), the table's rows");
}

void check_all_in_table(const char* name, const int64_t* i, int64_t samples, int64_t rows) {
  for (int64_t sample = 0; sample < samples; ++sample) check_in_table(name, i[sample], rows);
}

void run_step(const Step& op) {
  check_in_table("row", *op.row, op.rows);
  const Unlocked unlocked(op.size.all());
  active().step(op);
}

// As step, of contiguous tensors: (samples, elements of all, table, rows, row, streams, copies,
// the model's dtype, x, m, m_u, v, g, h, z, x_next, h_next, model_input), 0 for an absent one.
// A plain C function, since pybind11 takes as long over 18 integers as a small step itself.
PyObject* step_dense(PyObject*, PyObject* const* values, Py_ssize_t count) {
  constexpr Py_ssize_t kValues = 18;
  if (count != kValues) return PyErr_Format(PyExc_TypeError, "step_dense: takes 18 integers");
  int64_t v[kValues];
  for (Py_ssize_t i = 0; i < kValues; ++i) {
    v[i] = PyLong_AsLongLong(values[i]);
    if (v[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const int64_t elements = v[0] ? v[1] / v[0] : 0;
  const auto state = [&](int i) { return dense(v[i], DType::f32, elements); };
  const auto model = [&](int i) { return dense(v[i], static_cast<DType>(v[7]), elements); };
  try {
    run_step({{{v[0], 1, 1, elements}}, pointer<const float>(v[2]), v[3],
              pointer<const int64_t>(v[4]), pointer<const int64_t>(v[5]), v[6], state(8), model(9),
              model(10), model(11), state(12), state(13), state(14), state(15), state(16),
              model(17)});
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_ValueError, "%s", error.what());
  }
  Py_RETURN_NONE;
}

PyMethodDef step_dense_method = {"step_dense",
                                 reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(step_dense)),
                                 METH_FASTCALL, "The step of contiguous tensors."};

void run_noising(const Noising& op) {
  check_all_in_table("t", op.t, op.size.of[0], op.rows);
  const Unlocked unlocked(op.size.all());
  active().noising(op);
}

// Adds name(...), which runs a kernel, and bind_name(...), which returns a function that does so
// each time it is called, without arguments: for who makes the same call over and over.
template <class Op, class... Args, class Run>
void add(py::module_& module, const std::string& name, Op (*made)(Args...), Run run) {
  module.def(name.c_str(), [=](Args... args) { run(made(args...)); });
  module.def(("bind_" + name).c_str(), [=](Args... args) {
    return py::cpp_function([run, op = made(args...)] { run(op); });
  });
}

// Runs the kernel, with the lock given away if the op's work is large.
template <class Op>
auto running(void (*Kernels::*kernel)(Op), int64_t (*work)(const Op&)) {
  return [=](const Op& op) {
    const Unlocked unlocked(work(op));
    (active().*kernel)(op);
  };
}

// Adds name_runs(dtype): whether a kernel is there for this dtype on this machine.
void add_runs(py::module_& module, const std::string& name, bool (*Kernels::*runs)(DType)) {
  module.def((name + "_runs").c_str(),
             [=](int dtype) { return (active().*runs)(static_cast<DType>(dtype)); });
}

// Sizes: samples, height, width, output channels, input channels, tile, upsample, bias stride.
// Operands: x, residual, out.
Conv3x3 conv3x3(const py::tuple& size, int dtype, int64_t weight, int64_t bias, const py::list& o) {
  const auto of = [&](int i) { return size[i].cast<int64_t>(); };
  return {of(0), of(1), of(2), of(3), of(4), of(5), of(6) != 0, static_cast<DType>(dtype),
          pointer<const void>(weight), pointer<const float>(bias), of(7), operand(o[0]),
          operand(o[1]), operand(o[2])};
}

// Size: outputs, inputs, tile, turned. Strides: of outputs, inputs and taps.
PackConv3x3 pack_conv3x3(const py::tuple& size, int dtype, int64_t weight, const py::tuple& strides,
                         int64_t out) {
  const Size of = size_of(size);
  const auto stride = [&](int i) { return strides[i].cast<int64_t>(); };
  return {of.of[0], of.of[1], of.of[2], of.of[3] != 0, static_cast<DType>(dtype),
          pointer<const float>(weight), {stride(0), stride(1), stride(2)}, pointer<void>(out)};
}

// Sizes: samples, height, width, output channels, input channels, tile. Operands: x, grad.
Conv3x3WeightGradient conv3x3_weight_gradient(const py::tuple& size, int dtype, int64_t out,
                                              const py::list& o) {
  const auto of = [&](int i) { return size[i].cast<int64_t>(); };
  return {of(0), of(1), of(2), of(3), of(4), of(5), static_cast<DType>(dtype), pointer<float>(out),
          operand(o[0]), operand(o[1])};
}

// Size: batch, heads, queries, keys; then a head's. Operands: q, k, v, out.
Attention attention(const py::tuple& size, int64_t head_size, double scale, int64_t lse,
                    const py::list& o) {
  const Size of = size_of(size);
  return {of.of[0], of.of[1], of.of[2], of.of[3], head_size, static_cast<float>(scale),
          operand(o[0]), operand(o[1]), operand(o[2]), operand(o[3]), pointer<float>(lse)};
}

// The first four operands are the forward op's; then grad and the gradients of q, k and v.
AttentionBackward attention_backward(const py::tuple& size, int64_t head_size, double scale,
                                     int64_t lse, const py::list& o) {
  return {attention(size, head_size, scale, lse, o), operand(o[4]), operand(o[5]), operand(o[6]),
          operand(o[7])};
}

// The first six operands are the forward op's; then grad and the gradients of its parameters.
GroupNormSiluBackward group_norm_silu_backward(const py::tuple& size, double eps, bool silu,
                                               const py::list& o) {
  return {group_norm_silu_of(size, eps, silu, o), operand(o[6]), operand(o[7]), operand(o[8]),
          operand(o[9]), operand(o[10])};
}

// Size: samples, rows, inputs, outputs. Operands: x, residual, out.
Linear linear(const py::tuple& size, int dtype, int64_t weight, int64_t bias, const py::list& o) {
  const Size of = size_of(size);
  return {of.of[0], of.of[1], of.of[2], of.of[3], static_cast<DType>(dtype),
          pointer<const void>(weight), pointer<const float>(bias), operand(o[0]), operand(o[1]),
          operand(o[2])};
}

WeightedMse weighted_mse(int64_t t, int64_t weights, int64_t times, int64_t losses, int64_t sums,
                         const py::tuple& size, const py::list& o) {
  const WeightedMse op = {size_of(size),          pointer<const int64_t>(t),
                          pointer<const float>(weights), times,
                          pointer<float>(losses), pointer<float>(sums),
                          operand(o[0]),          operand(o[1])};
  check_all_in_table("t", op.t, op.size.of[0], times);
  return op;
}

WeightedMseBackward weighted_mse_backward(int64_t t, int64_t weights, int64_t times, int64_t grad,
                                          double scale, const py::tuple& size, const py::list& o) {
  const WeightedMseBackward op = {
      size_of(size), pointer<const int64_t>(t), pointer<const float>(weights),
      pointer<const float>(grad), scale, operand(o[0]), operand(o[1]), operand(o[2]),
      operand(o[3])};
  check_all_in_table("t", op.t, op.size.of[0], times);
  return op;
}

TeacherStep teacher_step(int64_t table, int64_t rows, int64_t i, int64_t weights, double w,
                         const py::tuple& size, const py::list& o) {
  const TeacherStep op = {size_of(size), pointer<const float>(table), rows,
                          pointer<const int64_t>(i), pointer<const float>(weights),
                          static_cast<float>(w), operand(o[0]), operand(o[1]), operand(o[2]),
                          operand(o[3]), operand(o[4])};
  check_all_in_table("i", op.i, op.size.of[0], rows);
  return op;
}

LoadImages load_images(int64_t images, int64_t count, const py::tuple& stride, int64_t index,
                       int64_t flips, int64_t pad, const py::tuple& size, const py::tuple& out) {
  const LoadImages op = {size_of(size), pointer<const uint8_t>(images), count, size_of(stride),
                         pointer<const int64_t>(index), pointer<const bool>(flips), pad,
                         operand(out)};
  check_all_in_table("index", op.index, op.size.of[0], count);
  return op;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastdiff's CPU kernels";
  active();
  module.def("isa", [] { return active().isa; }, "The instruction set picked for this machine.");
  module.def("threaded", &has_threads, "Whether an OpenMP runtime was found in the process.");
  add(module, "step", &step_of, &run_step);
  module.add_object("step_dense", PyCFunction_New(&step_dense_method, nullptr));
  add(module, "noising", &noising_of, &run_noising);
  add(module, "cfg", &cfg_of,
      running<Cfg>(&Kernels::cfg, [](const Cfg& op) { return op.size.all(); }));
  add(module, "randn", &randn_of, running<Randn>(&Kernels::randn, [](const Randn& op) {
        return op.samples * op.elements;
      }));
  add_runs(module, "conv3x3", &Kernels::conv3x3_runs);
  add_runs(module, "attention", &Kernels::attention_runs);
  add_runs(module, "linear", &Kernels::linear_runs);
  add(module, "conv3x3", &conv3x3, running<Conv3x3>(&Kernels::conv3x3, [](const Conv3x3& op) {
        return op.samples * op.height * op.width * op.outputs;
      }));
  add(module, "conv3x3_weight_gradient", &conv3x3_weight_gradient,
      running<Conv3x3WeightGradient>(&Kernels::conv3x3_weight_gradient,
                                     [](const Conv3x3WeightGradient& op) {
                                       return op.inputs * op.outputs * 9;
                                     }));
  add(module, "pack_conv3x3", &pack_conv3x3,
      running<PackConv3x3>(&Kernels::pack_conv3x3,
                           [](const PackConv3x3& op) { return op.inputs * op.outputs * 9; }));
  add(module, "group_norm_silu", &group_norm_silu_of,
      running<GroupNormSilu>(&Kernels::group_norm_silu, [](const GroupNormSilu& op) {
        return op.samples * op.channels * op.pixels;
      }));
  add(module, "group_norm_silu_backward", &group_norm_silu_backward,
      running<GroupNormSiluBackward>(
          &Kernels::group_norm_silu_backward, [](const GroupNormSiluBackward& op) {
            return op.of.samples * op.of.channels * op.of.pixels;
          }));
  add(module, "attention", &attention,
      running<Attention>(&Kernels::attention, [](const Attention& op) {
        return op.batch * op.heads * op.queries * op.keys * op.size;
      }));
  add(module, "attention_backward", &attention_backward,
      running<AttentionBackward>(&Kernels::attention_backward, [](const AttentionBackward& op) {
        return op.of.batch * op.of.heads * op.of.queries * op.of.keys * op.of.size;
      }));
  add(module, "linear", &linear, running<Linear>(&Kernels::linear, [](const Linear& op) {
        return op.samples * op.rows * op.outputs;
      }));
  add(module, "weighted_mse", &weighted_mse, running<WeightedMse>(
      &Kernels::weighted_mse, [](const WeightedMse& op) { return op.size.all(); }));
  add(module, "weighted_mse_backward", &weighted_mse_backward, running<WeightedMseBackward>(
      &Kernels::weighted_mse_backward,
      [](const WeightedMseBackward& op) { return op.size.all(); }));
  add(module, "teacher_step", &teacher_step, running<TeacherStep>(
      &Kernels::teacher_step, [](const TeacherStep& op) { return op.size.all(); }));
  add(module, "load_images", &load_images, running<LoadImages>(
      &Kernels::load_images, [](const LoadImages& op) { return op.size.all(); }));
}
