// Runs the tests; the exit status is 1 if a check failed.
#include <cstring>
#include <stdexcept>

#include "../cpu/kernels.h"
#include "check.h"

int main() {
  test_tensor();
  test_parallel();
  test_words();
  test_normals();
  test_functions();
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    try {
      const fd::Kernels& kernels = fd::kernels(isa);
      CHECK(std::strcmp(kernels.isa, isa) == 0, "asked for %s, got %s", isa, kernels.isa);
      test_randn(kernels);
      test_step(kernels);
      test_noising(kernels);
      test_cfg(kernels);
      test_conv3x3(kernels);
      test_group_norm_silu(kernels);
      test_group_norm_silu_backward(kernels);
      test_attention(kernels);
      test_attention_backward(kernels);
      test_linear(kernels);
      test_weighted_mse(kernels);
      test_weighted_mse_of_nothing(kernels);
      test_teacher_step(kernels);
      test_load_images(kernels);
      std::printf("%s: tested\n", isa);
    } catch (const std::invalid_argument& error) {
      std::printf("%s: not tested: %s\n", isa, error.what());
    }
  }
#ifndef __SANITIZE_THREAD__
  test_emulated();
#endif
  std::printf("%d failures\n", failures);
  return failures != 0;
}
