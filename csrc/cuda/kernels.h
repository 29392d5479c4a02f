// The CUDA kernels: each is put on a queue, and returns before it has run.
//
// What is verified here is compiled code, and the same sources in the emulator of
// csrc/tests/emulator. Nothing has run on a GPU.
#pragma once

#include "../cfg.h"
#include "../group_norm_silu.h"
#include "../noising.h"
#include "../randn.h"
#include "../step.h"

namespace fd {
namespace gpu {

struct Queue {
  int device;
  void* stream;  // a cudaStream_t of that device
};

// std::runtime_error where the launch fails. A row or timestep that is not in the table gives NaN,
// since nothing is read back to refuse it.
void step(Step, Queue);
void noising(Noising, Queue);
void cfg(Cfg, Queue);
void randn(Randn, Queue);

// Parts into which the moments of a group are cut, at most. `scratch`: double
// [samples, groups, kParts, 2] on the device, until the kernel has run.
constexpr int64_t kParts = 64;
void group_norm_silu(GroupNormSilu, void* scratch, Queue);

extern const char* const kVersion;  // of CUDA, that these were built with

// Why these kernels cannot run on this machine, or null.
const char* problem();

}  // namespace gpu
}  // namespace fd
