// The CPU kernels: each compiled for several instruction sets, of which the best is picked at run
// time.
#pragma once

#include "../cfg.h"
#include "../noising.h"
#include "../randn.h"
#include "../step.h"

namespace fd {

struct Kernels {
  const char* isa;
  bool (*runs_here)();
  void (*step)(Step);
  void (*noising)(Noising);
  void (*cfg)(Cfg);
  void (*randn)(const Randn&);
};

#define FD_KERNELS(isa)                \
  namespace isa {                      \
  void step(Step);               \
  void noising(Noising);         \
  void cfg(Cfg);                 \
  void randn(const Randn&);      \
  }
FD_KERNELS(scalar)
FD_KERNELS(avx2)
FD_KERNELS(avx512)
#undef FD_KERNELS

// The best for this machine, or the named one. invalid_argument for a name that is unknown or that
// this machine cannot run.
const Kernels& kernels(const char* isa);

}  // namespace fd
