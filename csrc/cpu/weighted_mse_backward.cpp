#include "../weighted_mse.h"

#include "kernels.h"
#include "run.h"
#include "../simplify.h"

namespace fd {
namespace FD_ISA {

void weighted_mse_backward(WeightedMseBackward op) {
  simplify(1, op.size, {&op.output, &op.target, &op.grad_output, &op.grad_target});

  for_runs(op.size, [&](const Run& run) {
    Buffer output_buffer, target_buffer, to_output_buffer, to_target_buffer;
    const float* output = read(op.output, op.size, run, output_buffer);
    const float* target = read(op.target, op.size, run, target_buffer);
    float* to_output = place(op.grad_output, op.size, run, to_output_buffer);
    float* to_target = place(op.grad_target, op.size, run, to_target_buffer);
    const float slope = weighted_mse_slope(op.scale, op.weights[op.t[run.sample]],
                                           op.grad[run.sample]);
#pragma omp simd
    for (int i = 0; i < run.count; ++i) {
      to_output[i] = slope * (output[i] - target[i]);
      to_target[i] = -to_output[i];
    }
    write(op.grad_output, op.size, run, to_output);
    write(op.grad_target, op.size, run, to_target);
  });
}

}  // namespace FD_ISA
}  // namespace fd
