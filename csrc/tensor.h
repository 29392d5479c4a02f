// What the kernels are told of a tensor: an address, a dtype code and four strides.
//
// Also the two conversions of 16-bit floats, in integer arithmetic so that they are the same on
// every machine: round to nearest, ties to even; NaN stays NaN, too large becomes infinity.
#pragma once

#include <cstdint>
#include <cstring>

// Internal linkage: the CPU kernels compile these functions once for each instruction set, and a
// linker that merged the copies would run AVX-512 on machines that lack it.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define FD_MEMBER __host__ __device__ __forceinline__
#else
#define FD_MEMBER inline __attribute__((always_inline))
#endif
#define FD_HOST_DEVICE static FD_MEMBER
#define FD_NOINLINE inline __attribute__((noinline))  // where a copy for each caller gains nothing

#define FD_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__clang__)
#define FD_UNROLL(times) FD_PRAGMA(unroll times)
#else
#define FD_UNROLL(times) FD_PRAGMA(GCC unroll times)
#endif

// Contraction is off, so a result depends on the instruction set only where this says so.
#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__FMA__) || \
    defined(__ARM_FEATURE_FMA) || defined(FD_EMULATED)
#define FD_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FD_FMA(a, b, c) ((a) * (b) + (c))
#endif

namespace fd {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };  // DTYPES of fastdiff/ops/layout.py

// Strides are in elements; dimension 0 is the batch. No data: the operand is absent.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {0, 0, 0, 0};
  bool wide = false;  // for csrc/cuda, which sets it: samples are read 128 bits at a time
};

FD_HOST_DEVICE constexpr int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct Size {
  int64_t of[4] = {0, 1, 1, 1};

  FD_MEMBER int64_t sample() const { return of[1] * of[2] * of[3]; }
  FD_MEMBER int64_t all() const { return of[0] * sample(); }
};

// Whether the elements of a sample are adjacent.
FD_HOST_DEVICE bool is_dense(const Operand& o, const Size& size) {
  int64_t step = 1;
  for (int d = 3; d > 0; step *= size.of[d--])
    if (size.of[d] != 1 && o.stride[d] != step) return false;
  return true;
}

FD_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

FD_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FD_HOST_DEVICE float from_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

FD_HOST_DEVICE uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16);
}

FD_HOST_DEVICE float from_f16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu, sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;  // the exponent's bias: 15 to 127
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t special = normal + 0x38000000u;  // infinity and NaN
  return float_of(sign | (magnitude >= 0x7c00u ? special : magnitude < 0x400u ? small : normal));
}

FD_HOST_DEVICE uint16_t to_f16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Beside 1/2 one unit in the last place is the spacing of the subnormals, so the sum rounds.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite));
}

}  // namespace fd
