#include "launch.h"

namespace fd {
namespace gpu {
namespace {

__global__ void probe_kernel() {}

#define FD_QUOTE(number) #number
#define FD_VERSION(major, minor) FD_QUOTE(major) "." FD_QUOTE(minor)

}  // namespace

const char* const kVersion =
#ifdef __CUDACC__
    FD_VERSION(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__);
#else
    "the emulator";
#endif

const char* problem() {
  int devices = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace gpu
}  // namespace fd
