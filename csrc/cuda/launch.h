// The host's side of a launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fd {
namespace gpu {
namespace {

constexpr unsigned kThreads = 256;      // of a block
constexpr int64_t kMostBlocks = 65535;  // in y

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not find it
  throw std::runtime_error(std::string("fastdiff's CUDA kernels: ") + cudaGetErrorString(error) +
                           "; fastdiff.backend(\"triton\") or (\"reference\") does without them");
}

// Makes a device the current one, as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_));
    if (before_ != device_) check(cudaSetDevice(device_));
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int device_, before_ = 0;
};

template <class... Args>
void launch(const Queue& queue, dim3 blocks, unsigned threads, void (*kernel)(Args...),
            Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace
}  // namespace gpu
}  // namespace fd
