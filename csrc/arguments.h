// What Python gives as arguments, as the structs that kernels take: addresses, sizes and strides
// are integers. fastdiff/op.py makes the calls, after the checks of the public functions.
#pragma once

#include <pybind11/pybind11.h>

#include "cfg.h"
#include "group_norm_silu.h"
#include "noising.h"
#include "randn.h"
#include "step.h"

namespace fd {
namespace {

namespace py = pybind11;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

inline Size size_of(const py::tuple& size) {
  Size of;
  for (int d = 0; d < 4; ++d) of.of[d] = size[d].cast<int64_t>();
  return of;
}

// (address, dtype code, four strides) or None, as describe() of fastdiff/ops/layout.py gives them.
inline Operand operand(const py::handle& described) {
  Operand o;
  if (described.is_none()) return o;
  const auto parts = py::reinterpret_borrow<py::tuple>(described);
  const auto strides = py::reinterpret_borrow<py::tuple>(parts[2]);
  o.data = pointer<void>(parts[0].cast<int64_t>());
  o.dtype = static_cast<DType>(parts[1].cast<int>());
  for (int d = 0; d < 4; ++d) o.stride[d] = strides[d].cast<int64_t>();
  return o;
}

inline Step step_of(int64_t table, int64_t rows, int64_t row, int64_t streams, int64_t copies,
                    const py::tuple& size, const py::list& o) {
  return {size_of(size), pointer<const float>(table), rows, pointer<const int64_t>(row),
          pointer<const int64_t>(streams), copies, operand(o[0]), operand(o[1]), operand(o[2]),
          operand(o[3]), operand(o[4]), operand(o[5]), operand(o[6]), operand(o[7]),
          operand(o[8]), operand(o[9])};
}

inline Noising noising_of(int64_t t, int64_t table, int64_t rows, int64_t streams, uint32_t row,
                          const py::tuple& size, const py::list& o) {
  return {size_of(size), pointer<const int64_t>(t), pointer<const float>(table), rows,
          pointer<const int64_t>(streams), row, operand(o[0]), operand(o[1]), operand(o[2]),
          operand(o[3])};
}

inline Cfg cfg_of(int64_t weights, double w, const py::tuple& size, const py::list& o) {
  return {size_of(size), pointer<const float>(weights), static_cast<float>(w), operand(o[0]),
          operand(o[1]), operand(o[2])};
}

inline Randn randn_of(int64_t samples, int64_t elements, int64_t streams, uint32_t row, bool bits,
                      int64_t out) {
  return {samples, elements, pointer<const int64_t>(streams), row, bits, pointer<void>(out)};
}

// Size: samples, channels, pixels, groups.
inline GroupNormSilu group_norm_silu_of(const py::tuple& size, double eps, bool silu,
                                        const py::list& o) {
  const Size of = size_of(size);
  return {of.of[0], of.of[1], of.of[2], of.of[3], static_cast<float>(eps), silu,
          operand(o[0]), operand(o[1]), operand(o[2]), operand(o[3]), operand(o[4]),
          operand(o[5])};
}

}  // namespace
}  // namespace fd
