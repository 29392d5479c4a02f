// The entry points of OpenMP that the kernels look up, by threads of the standard library: what the
// thread sanitizer understands. Every loop runs on three, whatever the machine has.
#include <thread>
#include <vector>

namespace {
constexpr int kThreads = 3;
thread_local int number = 0, team = 1;
}  // namespace

extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned, unsigned) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([=] {
      number = i;
      team = kThreads;
      function(data);
    });
  for (std::thread& thread : threads) thread.join();
}
int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team; }
int omp_get_max_threads() { return kThreads; }
}
