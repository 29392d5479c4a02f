// The CPU kernels: each compiled for several instruction sets, the best picked at run time.
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
  void (*randn)(Randn);
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
  }
FD_DECLARE(scalar)
FD_DECLARE(avx2)
FD_DECLARE(avx512)
#undef FD_DECLARE

}  // namespace fd
