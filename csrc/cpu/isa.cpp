// The choice of the instruction set.
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fd {
namespace {

#define FD_OF_AVX512(result, name, arguments) avx512::name,
#define FD_OF_AVX2(result, name, arguments) avx2::name,
#define FD_OF_SCALAR(result, name, arguments) scalar::name,

// Best first. Each asks for what ninja_build.py compiles it with.
constexpr Kernels kAll[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     },
     FD_KERNELS(FD_OF_AVX512)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     FD_KERNELS(FD_OF_AVX2)},
#endif
    {"scalar", [] { return true; }, FD_KERNELS(FD_OF_SCALAR)},
};

}  // namespace

const Kernels& kernels(const char* isa) {
  std::string known;
  for (const Kernels& each : kAll) {
    if ((!isa || each.isa == std::string(isa)) && each.runs_here()) return each;
    if (each.runs_here()) known += (known.empty() ? "" : ", ") + std::string(each.isa);
  }
  throw std::invalid_argument("FASTDIFF_ISA=" + std::string(isa) + ": this machine runs " + known);
}

}  // namespace fd
