// Stores that pass the cache by, for outputs that would not stay in it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__unix__)
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fd {
namespace {

// Whether an op that moves so many bytes leaves nothing of use in the cache.
inline bool beyond_cache(int64_t bytes) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
  static const int64_t found = 0;
#endif
  return bytes > 2 * (found > 0 ? found : int64_t{32} << 20);
}

#if defined(__AVX512F__)
constexpr uintptr_t kLine = 64;
inline void stream_line(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX2__)
constexpr uintptr_t kLine = 32;
inline void stream_line(void* to, const void* from) {
  _mm256_stream_si256(static_cast<__m256i*>(to),
                      _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
#elif defined(__x86_64__)
constexpr uintptr_t kLine = 16;
inline void stream_line(void* to, const void* from) {
  _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
}
#else
constexpr uintptr_t kLine = 64;
inline void stream_line(void* to, const void* from) { memcpy(to, from, kLine); }
#endif

inline void stream_bytes(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t ahead = -reinterpret_cast<uintptr_t>(to) % kLine;
  const int64_t head = ahead < bytes ? ahead : bytes;
  memcpy(out, in, head);
  int64_t done = head;
  for (; done + static_cast<int64_t>(kLine) <= bytes; done += kLine)
    stream_line(out + done, in + done);
  memcpy(out + done, in + done, bytes - done);
}

// Streamed stores are ordered before what other threads see after this.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace fd
