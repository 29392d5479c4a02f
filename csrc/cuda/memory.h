// Elements in memory, 128 bits at a time where they lie so, else one by one.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "../tensor.h"

namespace fd {
namespace gpu {
namespace {

#define FD_DEVICE __device__ __forceinline__

constexpr int kPack = 8;  // elements: 128 bits of a 16-bit dtype, twice as many of float32

struct Pack {
  float at[kPack];
};

template <class Body>
FD_DEVICE void each(Body body) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) body(i);
}

FD_DEVICE float load(const void* data, DType dtype, int64_t offset) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[offset];
  const uint16_t bits = static_cast<const uint16_t*>(data)[offset];
  return dtype == DType::bf16 ? from_bf16(bits) : from_f16(bits);
}

FD_DEVICE void store(void* data, DType dtype, int64_t offset, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(data)[offset] = value;
  else
    static_cast<uint16_t*>(data)[offset] = dtype == DType::bf16 ? to_bf16(value) : to_f16(value);
}

FD_DEVICE Pack load_wide(const void* data, DType dtype, int64_t offset) {
  if (dtype == DType::f32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + offset);
    const float4 a = from[0], b = from[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
  Pack x;
  if (dtype == DType::bf16)
    each([&](int i) { x.at[i] = from_bf16(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)); });
  else
    each([&](int i) { x.at[i] = from_f16(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16)); });
  return x;
}

// By intrinsics, since the compiler may cut a plain assignment of 128 bits into four stores.
FD_DEVICE void store_wide(void* data, DType dtype, int64_t offset, const Pack& x) {
  if (dtype == DType::f32) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(data) + offset);
    __stwb(to, make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
    return __stwb(to + 1, make_float4(x.at[4], x.at[5], x.at[6], x.at[7]));
  }
  uint32_t words[] = {0, 0, 0, 0};
  if (dtype == DType::bf16)
    each([&](int i) { words[i / 2] |= static_cast<uint32_t>(to_bf16(x.at[i])) << i % 2 * 16; });
  else
    each([&](int i) { words[i / 2] |= static_cast<uint32_t>(to_f16(x.at[i])) << i % 2 * 16; });
  __stwb(reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + offset),
         make_uint4(words[0], words[1], words[2], words[3]));
}

// Whether a pack can begin there, and at each of the strides from there.
inline bool is_aligned(const Operand& o, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
  for (int64_t stride : strides) aligned &= stride * bytes_of(o.dtype) % 16 == 0;
  return aligned;
}

}  // namespace
}  // namespace gpu
}  // namespace fd
