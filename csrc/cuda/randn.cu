#include "../randn.h"

#include "packs.h"

namespace fd {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kThreads, kBlocks)
    randn_kernel(Randn op, Size size, Operand out) {
  for_packs<true>(size, [&](const auto& at) {
    const Stream stream = stream_of(op.streams + 2 * at.sample, op.row);
    if (!op.bits) return at.write(f32(out), make_noise(stream, at.first));
    uint32_t words[kPack];
    make_words(stream, at.first, words);
    Pack bits;  // a word is as wide as a float
    each([&](int i) { bits.at[i] = float_of(words[i]); });
    at.write(f32(out), bits);
  });
}

}  // namespace

void randn(Randn op, Queue queue) {
  const Size size = {{op.samples, 1, 1, op.elements}};
  Operand out = {op.out, DType::f32, {op.elements, 0, 0, 1}};
  find_wide(size, {&out});
  launch_packs(queue, size, randn_kernel, op, size, out);
}

}  // namespace gpu
}  // namespace fd
