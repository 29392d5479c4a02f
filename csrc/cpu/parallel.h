// Threads of the OpenMP runtime that is already in the process, which is torch's.
//
// A runtime of our own would spin against that one, so none is linked: its entry points are looked
// up among what is loaded. They are those of libgomp, which libomp and libiomp5 have as well.
// Without any, the work is done by the calling thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*function)(void*), void* data, unsigned threads,
                                         unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
__attribute__((weak)) int omp_get_max_threads();
}

namespace fd {
namespace {

#ifndef FD_LARGE
#define FD_LARGE 32768
#endif
constexpr int64_t kLarge = FD_LARGE;  // elements from which more than one thread is worth its start

inline bool has_threads() { return GOMP_parallel && omp_get_thread_num && omp_get_num_threads; }

// Threads that a loop would run on.
inline int64_t most_threads() {
  return has_threads() && omp_get_max_threads ? omp_get_max_threads() : 1;
}

template <class Body>
struct Share {
  int64_t count;
  const Body& body;
  std::atomic<bool> failed{false};
  std::exception_ptr failure{};

  // Nothing may be thrown out of a thread: that would end the process.
  static void run(void* data) {
    Share& share = *static_cast<Share*>(data);
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t end = share.count * (thread + 1) / threads;
    try {
      for (int64_t i = share.count * thread / threads; i < end; ++i) share.body(i);
    } catch (...) {
      if (!share.failed.exchange(true)) share.failure = std::current_exception();
    }
  }
};

// body(0) to body(count - 1), in equal shares of neighbours. What a share throws (std::bad_alloc)
// is thrown here when all have ended.
template <class Body>
inline void for_each(int64_t count, bool large, const Body& body) {
  if (large && has_threads()) {
    Share<Body> share{count, body};
    GOMP_parallel(Share<Body>::run, &share, 0, 0);
    if (share.failure) std::rethrow_exception(share.failure);
  } else {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
}

}  // namespace
}  // namespace fd
