// The module fastdiff._cuda: each call is that of _C, then the device's number and its stream.
#include <string>

#include "../arguments.h"
#include "kernels.h"

namespace {

using namespace fd;

template <class Op, class... Args>
void add(py::module_& module, const char* name, Op (*made)(Args...),
         void (*kernel)(Op, gpu::Queue)) {
  module.def(name, [=](Args... args, int device, int64_t stream) {
    kernel(made(args...), {device, pointer<void>(stream)});
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "fastdiff's CUDA kernels";
  module.def("problem", &gpu::problem, "Why the kernels cannot run here, or None.");
  module.attr("CUDA") = gpu::kVersion;
  module.attr("PARTS") = gpu::kParts;
  add(module, "step", &step_of, &gpu::step);
  add(module, "noising", &noising_of, &gpu::noising);
  add(module, "cfg", &cfg_of, &gpu::cfg);
  add(module, "randn", &randn_of, &gpu::randn);
  module.def("group_norm_silu",
             [](const py::tuple& size, double eps, bool silu, const py::list& o, int64_t scratch,
                int device, int64_t stream) {
               gpu::group_norm_silu(group_norm_silu_of(size, eps, silu, o), pointer<void>(scratch),
                                    {device, pointer<void>(stream)});
             });
}
