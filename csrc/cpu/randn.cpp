#include "../randn.h"

#include "kernels.h"
#include "run.h"

namespace fd {
namespace FD_ISA {

void randn(Randn op) {
  const Size size = {{op.samples, 1, 1, op.elements}};
  const Operand out = {op.out, DType::f32, {op.elements, 0, 0, 1}};  // a word is as wide as a float
  const auto make = op.bits ? make_bits : make_noise;

  for_runs(size, [&](const Run& run) {
    Buffer values;
    const Stream stream = stream_of(op.streams + 2 * run.sample, op.row);
    write(out, size, run, make(stream, run.first, run.count, values.at));
  });
}

}  // namespace FD_ISA
}  // namespace fd
