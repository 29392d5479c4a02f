#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fd {
namespace {

// Best first.
constexpr Kernels kAll[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     },
     avx512::step, avx512::noising, avx512::cfg, avx512::randn},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     avx2::step, avx2::noising, avx2::cfg, avx2::randn},
#endif
    {"scalar", [] { return true; }, scalar::step, scalar::noising, scalar::cfg, scalar::randn},
};

}  // namespace

const Kernels& kernels(const char* isa) {
  std::string known;
  for (const Kernels& candidate : kAll) {
    const bool named = isa && isa == std::string(candidate.isa);
    if ((named || !isa) && candidate.runs_here()) return candidate;
    if (named) throw std::invalid_argument("FASTDIFF_ISA=" + std::string(isa) + ": this processor cannot run it; unset it");
    known += (known.empty() ? "" : ", ") + std::string(candidate.isa);
  }
  throw std::invalid_argument("FASTDIFF_ISA=" + std::string(isa) + ": must be one of " + known);
}

}  // namespace fd
