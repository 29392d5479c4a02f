#include "../randn.h"

#include "kernels.h"
#include "run.h"

namespace fd {
namespace FD_ISA {

void randn(const Randn& op) {
  const Size size = {{op.samples, 1, 1, op.elements}};
  const Operand out = {op.out, DType::f32, {op.elements, 0, 0, 1}};  // words are as wide as floats

  for_runs(size, [&](const Run& run) {
    const Stream stream = stream_of(op.streams + 2 * run.sample, op.row);
    Buffer values;
    const float* at = op.bits ? make_bits(stream, run.first, run.count, values.at)
                              : make_noise(stream, run.first, run.count, values.at);
    write(out, size, run, {const_cast<float*>(at), false});
  });
}

}  // namespace FD_ISA
}  // namespace fd
