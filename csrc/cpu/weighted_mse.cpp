#include "../weighted_mse.h"

#include <vector>

#include "kernels.h"
#include "run.h"
#include "../simplify.h"

namespace fd {
namespace FD_ISA {
namespace {

double squared_errors(const float* output, const float* target, int count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < count; ++i) sum += squared_error(output[i], target[i]);
  return sum;
}

}  // namespace

// Each run by itself, then all in order: the same bits on any number of threads.
void weighted_mse(WeightedMse op) {
  simplify(1, op.size, {&op.output, &op.target});
  const int64_t samples = op.size.of[0], elements = op.size.sample();
  std::vector<double> parts;
  if (op.size.all()) {
    const Runs runs(op.size);
    parts.resize(runs.count);
    for_each(runs.count, op.size.all() >= kLarge, [&](int64_t i) {
      Buffer output, target;
      const Run run = runs[i];
      parts[i] = squared_errors(read(op.output, op.size, run, output),
                                read(op.target, op.size, run, target), run.count);
    });
  }

  std::vector<double> sums(3 * op.times);
  for (int64_t sample = 0, part = 0; sample < samples; ++sample) {
    double total = 0;
    for (const int64_t end = part + parts.size() / samples; part < end; ++part)
      total += parts[part];
    const double mse = total / elements;
    const int64_t t = op.t[sample];
    op.losses[sample] = static_cast<float>(op.weights[t] * mse);
    double* at = &sums[3 * t];
    at[0] += 1;
    at[1] += mse;
    at[2] += mse * mse;
  }
  for (size_t i = 0; i < sums.size(); ++i) op.sums[i] = static_cast<float>(sums[i]);
}

}  // namespace FD_ISA
}  // namespace fd
