// Checks that count and go on, and the list of tests.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition, ...)                                           \
  do {                                                                  \
    if (!(condition) && ++failures <= 20) {                             \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);       \
      std::printf(__VA_ARGS__);                                         \
      std::printf("\n");                                                \
    }                                                                   \
  } while (false)

namespace fd {
struct Kernels;
}

// One a file. The kernels are those of each instruction set this machine runs, in turn.
void test_tensor();
void test_parallel();
void test_words();
void test_normals();
void test_functions();
void test_barrier();
void test_emulated();
void test_randn(const fd::Kernels&);
void test_step(const fd::Kernels&);
void test_noising(const fd::Kernels&);
void test_cfg(const fd::Kernels&);
void test_conv3x3(const fd::Kernels&);
void test_group_norm_silu(const fd::Kernels&);
void test_group_norm_silu_backward(const fd::Kernels&);
void test_attention(const fd::Kernels&);
void test_attention_backward(const fd::Kernels&);
void test_linear(const fd::Kernels&);
void test_weighted_mse(const fd::Kernels&);
void test_weighted_mse_of_nothing(const fd::Kernels&);
void test_teacher_step(const fd::Kernels&);
void test_load_images(const fd::Kernels&);
