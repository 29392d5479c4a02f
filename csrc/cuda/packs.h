// The loop over elements: a thread takes a pack of a sample, then the pack a grid further on.
//
// An operand whose packs are aligned is read and written 128 bits at a time, any other one by one.
// Alignment, dtype and absence are the same for all threads, so that branching on them costs
// little; strides cost registers, so kernels are compiled with them (dense = false) and without.
#pragma once

#include "../randn.h"
#include "launch.h"
#include "memory.h"

namespace fd {
namespace gpu {
namespace {

// Blocks on a multiprocessor at once, at least: 80 registers a thread, which none needs more than.
constexpr unsigned kBlocks = 3;

// A pack's place; fewer elements than a pack at a sample's end.
template <bool dense>
struct Place {
  const Size& size;
  int64_t sample, first;
  int count;

  // body(i, offset) for each element.
  template <class Body>
  FD_DEVICE void for_offsets(const Operand& o, Body body) const {
    const int64_t start = sample * o.stride[0];
    if (dense) return each([&](int i) {
      if (i < count) body(i, start + first + i);
    });
    int64_t line = first / size.of[3], column = first % size.of[3];
    int64_t plane = line / size.of[2];
    line %= size.of[2];
    each([&](int i) {
      if (i < count)
        body(i, start + plane * o.stride[1] + line * o.stride[2] + column * o.stride[3]);
      if (++column < size.of[3]) return;
      column = 0;
      if (++line < size.of[2]) return;
      line = 0;
      ++plane;
    });
  }

  FD_DEVICE Pack read(const Operand& o) const {
    if (dense && o.wide && count == kPack)
      return load_wide(o.data, o.dtype, sample * o.stride[0] + first);
    Pack x = {};
    for_offsets(o, [&](int i, int64_t offset) { x.at[i] = load(o.data, o.dtype, offset); });
    return x;
  }

  FD_DEVICE void write(const Operand& o, const Pack& x) const {
    if (dense && o.wide && count == kPack)
      return store_wide(o.data, o.dtype, sample * o.stride[0] + first, x);
    for_offsets(o, [&](int i, int64_t offset) { store(o.data, o.dtype, offset, x.at[i]); });
  }
};

// Whether each operand present is dense; says of each whether its packs are aligned.
template <int operands>
bool find_wide(const Size& size, Operand* const (&all)[operands]) {
  bool dense = true;
  for (Operand* o : all)
    if (o->data) {
      o->wide = is_aligned(*o, {size.of[0] > 1 ? o->stride[0] : 0});
      dense &= is_dense(*o, size);
    }
  return dense;
}

// Blocks in x along a sample, in y one for each, as many as a GPU holds at once; then the kernel
// walks on.
template <class... Args>
void launch_packs(const Queue& queue, const Size& size, void (*kernel)(Args...), Args... args) {
  if (size.all() == 0) return;
  const OnDevice on(queue.device);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, queue.device));
  const int64_t packs = (size.sample() + kPack - 1) / kPack, warps = (packs + 31) / 32;
  const int64_t threads = std::min<int64_t>(kThreads, 32 * warps);
  const int64_t samples = std::min(size.of[0], kMostBlocks);
  const int64_t room = std::max<int64_t>(1, 8 * processors / samples);
  const int64_t blocks = std::min((packs + threads - 1) / threads, room);
  launch(queue, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(samples)),
         static_cast<unsigned>(threads), kernel, args...);
}

template <bool dense, class Body>
FD_DEVICE void for_packs(const Size& size, Body body) {
  const int64_t count = size.sample(), start = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x * kPack;
  for (int64_t sample = blockIdx.y; sample < size.of[0]; sample += gridDim.y)
    for (int64_t first = start * kPack; first < count; first += step) {
      const int64_t left = count - first;
      body(Place<dense>{size, sample, first, left < kPack ? static_cast<int>(left) : kPack});
    }
}

// An operand that is always float32: the compiler drops the other dtypes.
FD_DEVICE Operand f32(Operand o) {
  o.dtype = DType::f32;
  return o;
}

static_assert(kPack % 4 == 0, "whole blocks of Philox");

// The words of the elements from `first` on.
FD_DEVICE void make_words(const Stream& stream, int64_t first, uint32_t words[kPack]) {
#pragma unroll
  for (int i = 0; i < kPack; i += 4) {
    const auto block = philox(stream, static_cast<uint64_t>((first + i) / 4));
    for (int k = 0; k < 4; ++k) words[i + k] = static_cast<uint32_t>(block.word[k]);
  }
}

// Standard normals of the elements from `first` on.
FD_DEVICE Pack make_noise(const Stream& stream, int64_t first) {
  uint32_t words[kPack];
  make_words(stream, first, words);
  Pack z;
#pragma unroll
  for (int i = 0; i < kPack; i += 2) {
    const Pair pair = normals(words[i], words[i + 1]);
    z.at[i] = pair.cos;
    z.at[i + 1] = pair.sin;
  }
  return z;
}

}  // namespace
}  // namespace gpu
}  // namespace fd
