// A GPU of the tests: what csrc/cuda uses of CUDA, for the host's compiler, on one thread.
//
// The threads of a block are fibers. Each runs up to a barrier, in an order that is drawn anew at
// every barrier; blocks run one after the other, in an order that is drawn as well, and find NaN in
// shared memory. So code that needs a barrier it lacks, or memory that it did not write, gives
// results that a test sees. A barrier that a part of a block waits at while another part has ended
// is an error, as the language has it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// A section of its own, so that it can be filled with NaN.
#define __shared__ static __attribute__((section("fd_shared")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T>
inline void __stwb(T* to, T value) {
  if (reinterpret_cast<size_t>(to) % alignof(T)) std::abort();
  *to = value;
}

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

extern "C" {
extern char __start_fd_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_fd_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emulator {

constexpr size_t kStack = 1 << 17;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  bool ended;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline Fiber* running;
inline std::mt19937 order;
inline void (*body)(void*);
inline void* argument;

inline void run_body() {
  body(argument);
  running->ended = true;
  swapcontext(&running->context, &scheduler);
}

inline std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), 0u);
  std::shuffle(all.begin(), all.end(), order);
  return all;
}

inline void run_block() {
  if (__start_fd_shared) std::memset(__start_fd_shared, 0xff, __stop_fd_shared - __start_fd_shared);
  const unsigned threads = blockDim.x;
  while (fibers.size() < threads) fibers.emplace_back(new Fiber);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = *fibers[t];
    fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_body, 0);
  }
  for (unsigned ended = 0; ended < threads;) {
    if (ended) {
      std::fprintf(stderr, "emulator: %u of %u threads wait for ever\n", threads - ended, threads);
      std::abort();
    }
    for (unsigned t : shuffled(threads)) {
      running = fibers[t].get();
      threadIdx.x = t;
      swapcontext(&scheduler, &running->context);
      ended += running->ended;
    }
  }
}

}  // namespace emulator

inline void __syncthreads() {
  const dim3 mine = threadIdx;
  swapcontext(&emulator::running->context, &emulator::scheduler);
  threadIdx = mine;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
typedef void* cudaStream_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device ? cudaErrorInvalidDevice : cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                : "invalid device ordinal";
}
// Few, so that grids are smaller than what there is to do.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 1, cudaSuccess;
}

template <class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args...),
                               Args... args) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (!gridDim.x || !gridDim.y || gridDim.y > 65535 || !blockDim.x || blockDim.x > 1024)
    return cudaErrorInvalidConfiguration;
  const auto call = [&] { kernel(args...); };
  emulator::body = [](void* closure) { (*static_cast<decltype(call)*>(closure))(); };
  emulator::argument = const_cast<void*>(static_cast<const void*>(&call));
  for (unsigned y : emulator::shuffled(gridDim.y))
    for (unsigned x : emulator::shuffled(gridDim.x)) {
      blockIdx = dim3(x, y);
      emulator::run_block();
    }
  return cudaSuccess;
}
