// The CPU kernels: each compiled for several instruction sets, the best picked at run time.
#pragma once

#include "../attention.h"
#include "../cfg.h"
#include "../conv3x3.h"
#include "../group_norm_silu_backward.h"
#include "../linear.h"
#include "../load_images.h"
#include "../noising.h"
#include "../randn.h"
#include "../step.h"
#include "../teacher_step.h"
#include "../weighted_mse.h"

namespace fd {

// Every kernel, once: FD_KERNELS(each) is each(result, name, arguments) ...
#define FD_KERNELS(each)                                            \
  each(void, step, Step)                                            \
  each(void, noising, Noising)                                      \
  each(void, cfg, Cfg)                                              \
  each(void, randn, Randn)                                          \
  each(bool, conv3x3_runs, DType)                                   \
  each(void, conv3x3, Conv3x3)                                      \
  each(void, conv3x3_weight_gradient, Conv3x3WeightGradient)        \
  each(void, pack_conv3x3, PackConv3x3)                             \
  each(void, group_norm_silu, GroupNormSilu)                        \
  each(void, group_norm_silu_backward, GroupNormSiluBackward)       \
  each(bool, attention_runs, DType)                                 \
  each(void, attention, Attention)                                  \
  each(void, attention_backward, AttentionBackward)                 \
  each(bool, linear_runs, DType)                                    \
  each(void, linear, Linear)                                        \
  each(void, weighted_mse, WeightedMse)                             \
  each(void, weighted_mse_backward, WeightedMseBackward)            \
  each(void, teacher_step, TeacherStep)                             \
  each(void, load_images, LoadImages)

struct Kernels {
  const char* isa;
  bool (*runs_here)();
#define FD_POINTER(result, name, arguments) result (*name)(arguments);
  FD_KERNELS(FD_POINTER)
#undef FD_POINTER
};

// The best for this machine, or the named one. invalid_argument for a name that is unknown or that
// this machine cannot run.
const Kernels& kernels(const char* isa);

// Where the files of this folder, compiled with one of these as FD_ISA, put their kernel.
#define FD_DECLARE(result, name, arguments) result name(arguments);
namespace scalar {
FD_KERNELS(FD_DECLARE)
}
namespace avx2 {
FD_KERNELS(FD_DECLARE)
}
namespace avx512 {
FD_KERNELS(FD_DECLARE)
}
#undef FD_DECLARE

}  // namespace fd
