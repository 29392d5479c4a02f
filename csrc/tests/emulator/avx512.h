// A CPU of the tests: what csrc/cpu uses of AVX-512, lane by lane, for machines that lack it.
// Included before a source, these hide the compiler's intrinsics from it: they are of namespace fd.
//
// As there: bfloat16 is rounded to even, and its instructions take and give subnormal numbers as
// zeros; of a maximum with NaN, the second operand is taken; a reciprocal has 14 bits.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// macros of some compilers
#undef _mm512_extracti64x4_epi64
#undef _mm512_reduce_ps
#undef _mm512_setr_epi32
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32

namespace fd {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(64)));
typedef uint16_t Halves256 __attribute__((vector_size(32)));

#define FD_EACH(count) for (int i = 0; i < count; ++i)
#define FD_HERE(mask) FD_EACH(static_cast<int>(8 * sizeof mask)) if (mask >> i & 1)

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The elements of `size` bytes whose bit in the mask is set.
template <class Mask>
inline void copy(void* to, const void* from, Mask mask, int size) {
  FD_HERE(mask)
  memcpy(static_cast<char*>(to) + i * size, static_cast<const char*>(from) + i * size, size);
}

// memory

inline __m512 _mm512_loadu_ps(const void* from) {
  Floats r;
  memcpy(&r, from, sizeof r);
  return (__m512)r;
}
inline __m512i _mm512_loadu_si512(const void* from) { return (__m512i)_mm512_loadu_ps(from); }
inline void _mm512_storeu_ps(void* to, __m512 a) { memcpy(to, &a, sizeof a); }
inline void _mm512_storeu_si512(void* to, __m512i a) { memcpy(to, &a, sizeof a); }

inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  Floats r{};
  copy(&r, from, mask, 4);
  return (__m512)r;
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* from) {
  return (__m512i)_mm512_maskz_loadu_ps(mask, from);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
  Halves r{};
  copy(&r, from, mask, 2);
  return (__m512i)r;
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  Halves256 r{};
  copy(&r, from, mask, 2);
  return (__m256i)r;
}
inline void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 a) { copy(to, &a, mask, 4); }
inline void _mm512_mask_storeu_epi16(void* to, __mmask32 mask, __m512i a) { copy(to, &a, mask, 2); }
inline void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i a) { copy(to, &a, mask, 2); }

// float32

inline __m512 _mm512_setzero_ps() { return (__m512)Floats{}; }
inline __m512 _mm512_set1_ps(float a) { return (__m512)(Floats{} + a); }
inline float _mm512_cvtss_f32(__m512 a) { return a[0]; }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return (__m512)((Floats)a + (Floats)b); }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return (__m512)((Floats)a - (Floats)b); }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return (__m512)((Floats)a * (Floats)b); }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return (__m512)((Floats)a / (Floats)b); }

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  FD_EACH(16) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
  return _mm512_fmadd_ps(a, b, (__m512)-(Floats)c);
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return _mm512_fmadd_ps((__m512)-(Floats)a, b, c);
}

inline float larger(float a, float b) { return a > b ? a : b; }
inline __m512 _mm512_mask_max_ps(__m512 r, __mmask16 mask, __m512 a, __m512 b) {
  FD_HERE(mask) r[i] = larger(a[i], b[i]);
  return r;
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return _mm512_mask_max_ps(a, 0xffff, a, b); }
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) {
  return _mm512_maskz_loadu_ps(mask, &a);
}

inline float _mm512_reduce_add_ps(__m512 a) {
  for (int count = 8; count > 0; count /= 2) FD_EACH(count) a[i] += a[i + count];
  return a[0];
}
inline float _mm512_reduce_max_ps(__m512 a) {
  FD_EACH(16) a[0] = larger(a[0], a[i]);
  return a[0];
}

// x - floor(x): the only mode that is used, 1.
inline __m512 _mm512_reduce_ps(__m512 a, int) {
  FD_EACH(16) a[i] = std::isinf(a[i]) ? 0.0f : a[i] - std::floor(a[i]);
  return a;
}
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  FD_EACH(16) {
    const float power = std::fmax(-400.0f, std::fmin(400.0f, std::floor(b[i])));
    const double scaled = std::ldexp(static_cast<double>(a[i]), static_cast<int>(power));
    a[i] = std::isnan(b[i]) ? b[i] : static_cast<float>(scaled);
  }
  return a;
}
inline __m512 _mm512_rcp14_ps(__m512 a) {
  FD_EACH(16) a[i] = 1 / a[i];
  FD_EACH(16) if (std::isfinite(a[i])) a[i] = bits<float>(bits<uint32_t>(a[i]) & ~0x1ffu);
  return a;
}

// integers

inline __m512i _mm512_setzero_si512() { return (__m512i)Words{}; }
inline __m512i _mm512_set1_epi32(int a) { return (__m512i)(Words{} + static_cast<uint32_t>(a)); }
template <class... Int>
inline __m512i _mm512_setr_epi32(Int... a) {
  return (__m512i)Words{static_cast<uint32_t>(a)...};
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((Words)a + (Words)b); }
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return (__m512i)((Words)a * (Words)b); }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return (__m512i)((Words)a & (Words)b); }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return (__m512i)((Words)a | (Words)b); }
inline __m512i _mm512_slli_epi32(__m512i a, int count) { return (__m512i)((Words)a << count); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }

inline __m512i _mm512_maskz_mul_epu32(__mmask8 mask, __m512i a, __m512i b) {
  const Longs low = Longs{} + 0xffffffffu;
  const Longs product = ((Longs)a & low) * ((Longs)b & low);
  Longs r{};
  FD_HERE(mask) r[i] = product[i];
  return (__m512i)r;
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  Words r{};
  FD_EACH(16) r[i] = ((Halves256)a)[i];
  return (__m512i)r;
}

// places

inline __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
  __m256i r;
  memcpy(&r, reinterpret_cast<const char*>(&a) + half * sizeof r, sizeof r);
  return r;
}
inline __m256i _mm512_castsi512_si256(__m512i a) { return _mm512_extracti64x4_epi64(a, 0); }

inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  Floats r{};
  FD_EACH(16) {
    const uint32_t at = ((Words)index)[i];
    r[i] = at & 16 ? b[at & 15] : a[at & 15];
  }
  return (__m512)r;
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  Halves r{};
  FD_EACH(32) r[i] = ((Halves)a)[((Halves)index)[i] & 31];
  return (__m512i)r;
}
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int places) {
  Longs r{};
  FD_EACH(8) r[i] = ((Longs)(i < 4 ? a : b))[2 * (places >> i / 2 * 2 & 3) + i % 2];
  return (__m512i)r;
}

// In each 16 bytes: the elements of a and b in turn, from the `upper` half or the lower.
template <class T>
inline __m512i unpack(__m512i a, __m512i b, bool upper) {
  constexpr int count = 64 / sizeof(((T*)nullptr)[0][0]), part = count / 4;
  T r{};
  FD_EACH(count) {
    const int at = i / part * part + i % part / 2 + upper * part / 2;
    r[i] = ((T)(i % 2 ? b : a))[at];
  }
  return (__m512i)r;
}
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpack<Words>(a, b, false); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpack<Words>(a, b, true); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpack<Longs>(a, b, false); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpack<Longs>(a, b, true); }

// bfloat16

inline float flushed(float a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }
inline float wide(uint16_t a) { return flushed(bits<float>(static_cast<uint32_t>(a) << 16)); }
inline uint16_t narrow(float a) {
  const uint32_t whole = bits<uint32_t>(flushed(a));
  const uint32_t even = std::isnan(a) ? whole | 0x400000 : whole + 0x7fff + (whole >> 16 & 1);
  return static_cast<uint16_t>(even >> 16);
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  Halves256 r{};
  FD_EACH(16) r[i] = narrow(a[i]);
  return (__m256bh)r;
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  Halves r{};
  FD_EACH(32) r[i] = narrow(i < 16 ? low[i] : high[i - 16]);
  return (__m512bh)r;
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto product = [&](int i, float c) {
    return flushed(__builtin_fmaf(wide(((Halves)a)[i]), wide(((Halves)b)[i]), c));
  };
  FD_EACH(16) sum[i] = product(2 * i, product(2 * i + 1, sum[i]));
  return sum;
}

#undef FD_HERE
#undef FD_EACH

}  // namespace fd

#define __AVX512F__ 1
#define __builtin_cpu_supports(what) 1
