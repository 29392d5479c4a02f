// The loops are over runs: neighbouring elements of one sample, few enough to stay in L1.
//
// A run's values are float32 and adjacent. An operand that has them so in memory is used in
// place; any other is converted, run by run, into or out of a small buffer.
#pragma once

#include "../tensor.h"
#include "noise.h"
#include "parallel.h"

namespace fd {
namespace {

struct Run {
  int64_t sample, first;
  int count;
};

struct alignas(64) Buffer {
  float at[kRunNoise];
};

// The three inner strides are those of a contiguous sample.
inline bool is_dense(const Operand& o, const Size& size) {
  int64_t step = 1;
  for (int d = 3; d > 0; step *= size.of[d--])
    if (size.of[d] != 1 && o.stride[d] != step) return false;
  return true;
}

// Calls body(offset, first, count, stride) for each stretch of the run that has one stride.
template <class Body>
FD_HOST_DEVICE void for_stretches(const Operand& o, const Size& size, const Run& run, Body body) {
  if (is_dense(o, size)) {
    body(run.sample * o.stride[0] + run.first, 0, run.count, int64_t{1});
    return;
  }
  for (int done = 0; done < run.count;) {
    const int64_t index = run.first + done, column = index % size.of[3], line = index / size.of[3];
    const int64_t left = size.of[3] - column;
    const int count = left < run.count - done ? static_cast<int>(left) : run.count - done;
    body(run.sample * o.stride[0] + line / size.of[2] * o.stride[1] +
             line % size.of[2] * o.stride[2] + column * o.stride[3],
         done, count, o.stride[3]);
    done += count;
  }
}

template <class T, class Decode>
FD_HOST_DEVICE void gather(const Operand& o, const Size& size, const Run& run, float* values,
                           Decode decode) {
  for_stretches(o, size, run, [&](int64_t offset, int first, int count, int64_t stride) {
    const T* from = static_cast<const T*>(o.data) + offset;
    float* to = values + first;
    if (stride == 1) {
#pragma omp simd
      for (int i = 0; i < count; ++i) to[i] = decode(from[i]);
    } else {
      for (int i = 0; i < count; ++i) to[i] = decode(from[i * stride]);
    }
  });
}

template <class T, class Encode>
FD_HOST_DEVICE void scatter(const Operand& o, const Size& size, const Run& run,
                            const float* values, Encode encode) {
  for_stretches(o, size, run, [&](int64_t offset, int first, int count, int64_t stride) {
    T* to = static_cast<T*>(o.data) + offset;
    const float* from = values + first;
    if (stride != 1) {
      for (int i = 0; i < count; ++i) to[i * stride] = encode(from[i]);
    } else {
#pragma omp simd
      for (int i = 0; i < count; ++i) to[i] = encode(from[i]);
    }
  });
}

// The run's values: in place, or in the buffer; null if the operand is absent.
inline __attribute__((noinline)) const float* read(const Operand& o, const Size& size,
                                                   const Run& run, Buffer& buffer) {
  if (!o.data) return nullptr;
  if (o.dtype == DType::bf16)
    gather<uint16_t>(o, size, run, buffer.at, from_bf16);
  else if (o.dtype == DType::f16)
    gather<uint16_t>(o, size, run, buffer.at, from_f16);
  else if (is_dense(o, size))
    return static_cast<const float*>(o.data) + run.sample * o.stride[0] + run.first;
  else
    gather<float>(o, size, run, buffer.at, [](float x) { return x; });
  return buffer.at;
}

// Where to compute the run's values: in memory if they can stay there, else in the buffer.
struct Place {
  float* at;
  bool in_memory;
};

inline Place place(const Operand& o, const Size& size, const Run& run,
                   Buffer& buffer) {
  if (!o.data || o.dtype != DType::f32 || !is_dense(o, size))
    return {buffer.at, false};
  return {static_cast<float*>(o.data) + run.sample * o.stride[0] + run.first, true};
}

inline __attribute__((noinline)) void write(const Operand& o, const Size& size, const Run& run,
                                            const Place& values) {
  if (!o.data || values.in_memory) return;
  if (o.dtype == DType::bf16)
    scatter<uint16_t>(o, size, run, values.at, to_bf16);
  else if (o.dtype == DType::f16)
    scatter<uint16_t>(o, size, run, values.at, to_f16);
  else
    scatter<float>(o, size, run, values.at, [](float x) { return x; });
}

// How an op's elements are cut into runs. Where the last dimension is long, runs of its parallel
// lines follow each other, so that the channels of an image share what a cache line brings.
struct Runs {
  int64_t lines, length, chunks, count;

  explicit Runs(const Size& size)
      : lines(size.of[3] >= kRun / 4 ? size.of[1] * size.of[2] : 1),
        length(size.sample() / (lines ? lines : 1)),
        chunks((length + kRun - 1) / kRun),
        count(size.of[0] * chunks * lines) {}

  Run operator[](int64_t i) const {
    const int64_t line = i % lines, chunk = i / lines % chunks;
    const int64_t left = length - chunk * kRun;
    return {i / lines / chunks, line * length + chunk * kRun,
            static_cast<int>(left < kRun ? left : kRun)};
  }
};

// Runs `body(run)` over all elements; with several threads if they are many.
template <class Body>
inline void for_runs(const Size& size, const Body& body) {
  const Runs runs(size);
  const bool large = size.all() >= kLarge;
  for_each(runs.count, large, [&](int64_t i) { body(runs[i]); });
}

// Dimensions `from` to 3 in the order of memory, neighbours that all operands walk in one stride
// as one: fewer and longer. For an op to which the order of these dimensions is nothing.
template <int operands>
inline void simplify(int from, Size& size, Operand* const (&all)[operands]) {
  const auto move = [&](int to, int d) {  // dimension d to place `to`, those between one up
    const auto rotate = [&](int64_t* v) {
      const int64_t moved = v[d];
      for (int k = d; k > to; --k) v[k] = v[k - 1];
      v[to] = moved;
    };
    rotate(size.of);
    for (Operand* o : all) rotate(o->stride);
  };
  const auto order = [&](int d) { return size.of[d] == 1 ? INT64_MAX : all[0]->stride[d]; };
  for (int d = from + 1; d < 4; ++d) {
    int to = d;
    while (to > from && order(to - 1) < order(d)) --to;
    move(to, d);
  }
  for (int d = 3; d > from;) {
    bool merges = size.of[d - 1] != 1;
    for (const Operand* o : all)
      merges = merges && (!o->data || o->stride[d - 1] == o->stride[d] * size.of[d]);
    if (merges) {
      size.of[d] *= size.of[d - 1];
      size.of[d - 1] = 1;
      move(from, d - 1);
    } else {
      --d;
    }
  }
}

}  // namespace
}  // namespace fd
