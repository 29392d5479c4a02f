// The training loss and its gradient against their formulas in float64.
#include "../weighted_mse.h"

#include <vector>

#include "../cpu/kernels.h"
#include "check.h"
#include "field.h"

namespace {

constexpr int64_t kAt[] = {3, 0, 3};
constexpr float kWeights[] = {0.5f, 9.0f, 0.0f, 2.0f}, kGrads[] = {1.5f, -0.25f, 3.0f};
constexpr int64_t kTimes = 4;

double mean_square(const fd::Field& output, const fd::Field& target, int64_t sample,
                   int64_t elements) {
  double total = 0;
  for (int64_t e = 0; e < elements; ++e) {
    const double difference = output.get(sample, e) - target.get(sample, e);
    total += difference * difference;
  }
  return total / elements;
}

}  // namespace

void test_weighted_mse(const fd::Kernels& kernels) {
  using namespace fd;
  for (const Size& size : kSizes)
    for (Layout layout : kLayouts)
      for (int type = 0; type < 6; ++type) {
        const DType dtype = static_cast<DType>(type % 3);
        const int64_t samples = size.of[0], elements = size.sample();
        Field output(size, dtype, layout, 1);
        Field target(size, type < 3 ? dtype : DType::f32, type < 3 ? layout : Layout::strided, 2);

        std::vector<float> losses(samples, NAN), sums(3 * kTimes, NAN);
        std::vector<double> want_sums(3 * kTimes);
        kernels.weighted_mse({size, kAt, kWeights, kTimes, losses.data(), sums.data(),
                              output.operand(), target.operand()});
        double error = 0;
        for (int64_t s = 0; s < samples; ++s) {
          const double mse = mean_square(output, target, s, elements);
          error = std::fmax(error, std::abs(losses[s] / (kWeights[kAt[s]] * mse) - 1));
          for (int power = 0; power < 3; ++power)
            want_sums[3 * kAt[s] + power] += std::pow(mse, power);
        }
        for (size_t i = 0; i < sums.size(); ++i)
          error = std::fmax(error, std::abs(sums[i] - want_sums[i]) / (1e-30 + want_sums[i]));
        CHECK(error < 1.01 * 0x1p-24, "%s type=%d layout=%d elements=%d: %g", kernels.isa, type,
              static_cast<int>(layout), static_cast<int>(elements), error);

        const bool both = layout != Layout::gaps;
        Field to_output(size, dtype, layout), to_target(size, dtype, Layout::gaps);
        kernels.weighted_mse_backward({size, kAt, kWeights, kGrads, 2.0 / elements,
                                       output.operand(), target.operand(), to_output.operand(),
                                       both ? to_target.operand() : Operand{}});
        const auto want = [&](double sign) {
          return [&, sign](int64_t s, int64_t e) {
            return sign * 2 / elements * kWeights[kAt[s]] * kGrads[s] *
                   (output.get(s, e) - target.get(s, e));
          };
        };
        const double first = to_output.error(want(1));
        const double second = both ? to_target.error(want(-1)) : 0;
        CHECK(first < to_output.tolerance() && second < to_output.tolerance() &&
                  !to_output.overrun() && !to_target.overrun(),
              "%s type=%d layout=%d elements=%d: %g %g", kernels.isa, type,
              static_cast<int>(layout), static_cast<int>(elements), first, second);
      }
}

// Nothing to sum: sums of zero, and means of no elements.
void test_weighted_mse_of_nothing(const fd::Kernels& kernels) {
  using namespace fd;
  for (const Size& size : {Size{{0, 1, 1, 8}}, Size{{2, 1, 1, 0}}, Size{{2, 0, 1, 300}}}) {
    float losses[2] = {1, 1}, sums[3 * kTimes], unused = 0;
    const Operand none = {&unused, DType::f32, {0, 0, 0, 1}};
    kernels.weighted_mse({size, kAt, kWeights, kTimes, losses, sums, none, none});
    CHECK(sums[3 * 1] == 0 && sums[3 * 1 + 2] == 0, "%s: %g", kernels.isa, sums[3]);
    if (size.of[0])
      CHECK(std::isnan(losses[0]) && std::isnan(losses[1]) && sums[3 * 3] == 1, "%s: %g",
            kernels.isa, losses[0]);
  }
}
