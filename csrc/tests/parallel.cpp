// Loops over threads: every index once, and what a thread throws reaches the caller.
#include "../cpu/parallel.h"

#include <new>
#include <vector>

#include "check.h"

void test_parallel() {
  std::vector<int> times(100);
  fd::for_each(100, true, [&](int64_t i) { ++times[i]; });
  for (int count : times) CHECK(count == 1, "an index ran %d times", count);

  for (int64_t from : {0, 99}) {  // of every thread, and of the last
    int caught = 0;
    try {
      fd::for_each(100, true, [&](int64_t i) {
        if (i >= from) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      ++caught;
    }
    CHECK(caught == 1, "of %d: caught %d", static_cast<int>(from), caught);
  }
}
