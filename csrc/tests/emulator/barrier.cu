// The emulator itself: it must show a barrier that is missing, and one that is there.
#include <cuda_runtime.h>

#include "../check.h"

namespace {

constexpr int kSize = 64;

__global__ void reverse(const float* x, float* out, bool waits) {
  __shared__ float all[kSize];
  all[threadIdx.x] = x[threadIdx.x];
  if (waits) __syncthreads();
  out[threadIdx.x] = all[kSize - 1 - threadIdx.x];
}

int wrong(bool waits) {
  float x[kSize], out[kSize];
  for (int i = 0; i < kSize; ++i) x[i] = static_cast<float>(i);
  cudaLaunchConfig_t config = {dim3(1), dim3(kSize), 0, nullptr, nullptr, 0};
  const float* from = x;
  float* to = out;
  cudaLaunchKernelEx(&config, reverse, from, to, waits);
  int count = 0;
  for (int i = 0; i < kSize; ++i) count += out[i] != x[kSize - 1 - i];
  return count;
}

}  // namespace

void test_barrier() {
  CHECK(wrong(true) == 0, "with its barrier");
  CHECK(wrong(false) > 0, "without its barrier");
}
