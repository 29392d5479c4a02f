// The CPU kernels: each compiled for several instruction sets, the best picked at run time.
#pragma once

#include "../attention.h"
#include "../cfg.h"
#include "../conv3x3.h"
#include "../group_norm_silu.h"
#include "../linear.h"
#include "../noising.h"
#include "../randn.h"
#include "../step.h"
#include "../teacher_step.h"
#include "../weighted_mse.h"

namespace fd {

struct Kernels {
  const char* isa;
  bool (*runs_here)();
  void (*step)(Step);
  void (*noising)(Noising);
  void (*cfg)(Cfg);
  void (*randn)(Randn);
  bool (*conv3x3_runs)(DType);
  void (*conv3x3)(Conv3x3);
  void (*group_norm_silu)(GroupNormSilu);
  bool (*attention_runs)(DType);
  void (*attention)(Attention);
  bool (*linear_runs)(DType);
  void (*linear)(Linear);
  void (*weighted_mse)(WeightedMse);
  void (*weighted_mse_backward)(WeightedMseBackward);
  void (*teacher_step)(TeacherStep);
};

// The best for this machine, or the named one. invalid_argument for a name that is unknown or that
// this machine cannot run.
const Kernels& kernels(const char* isa);

// Where the files of this folder, compiled with one of these as FD_ISA, put their kernel.
#define FD_DECLARE(isa) \
  namespace isa {       \
  void step(Step);      \
  void noising(Noising); \
  void cfg(Cfg);        \
  void randn(Randn);    \
  bool conv3x3_runs(DType); \
  void conv3x3(Conv3x3); \
  void group_norm_silu(GroupNormSilu); \
  bool attention_runs(DType); \
  void attention(Attention); \
  bool linear_runs(DType); \
  void linear(Linear); \
  void weighted_mse(WeightedMse); \
  void weighted_mse_backward(WeightedMseBackward); \
  void teacher_step(TeacherStep); \
  }
FD_DECLARE(scalar)
FD_DECLARE(avx2)
FD_DECLARE(avx512)
#undef FD_DECLARE

}  // namespace fd
