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

// Calls body(offset, first, count, stride) for each part of the run that has one stride.
template <class Body>
FD_HOST_DEVICE void for_parts(const Operand& o, const Size& size, const Run& run, Body body) {
  const int64_t start = run.sample * o.stride[0];
  if (is_dense(o, size)) return body(start + run.first, 0, run.count, int64_t{1});
  for (int done = 0; done < run.count;) {
    const int64_t column = (run.first + done) % size.of[3], line = (run.first + done) / size.of[3];
    const int64_t left = size.of[3] - column;
    const int count = left < run.count - done ? static_cast<int>(left) : run.count - done;
    body(start + line / size.of[2] * o.stride[1] + line % size.of[2] * o.stride[2] +
             column * o.stride[3],
         done, count, o.stride[3]);
    done += count;
  }
}

template <class T, float decode(T)>
FD_HOST_DEVICE void gather(const Operand& o, const Size& size, const Run& run, float* values) {
  for_parts(o, size, run, [&](int64_t offset, int first, int count, int64_t stride) {
    const T* from = static_cast<const T*>(o.data) + offset;
    float* to = values + first;
    if (stride == 1) {
#pragma omp simd
      for (int i = 0; i < count; ++i) to[i] = decode(from[i]);
    } else {
#pragma omp simd
      for (int i = 0; i < count; ++i) to[i] = decode(from[i * stride]);
    }
  });
}

template <class T, T encode(float)>
FD_HOST_DEVICE void scatter(const Operand& o, const Size& size, const Run& run,
                            const float* values) {
  for_parts(o, size, run, [&](int64_t offset, int first, int count, int64_t stride) {
    T* to = static_cast<T*>(o.data) + offset;
    const float* from = values + first;
    if (stride == 1) {
#pragma omp simd
      for (int i = 0; i < count; ++i) to[i] = encode(from[i]);
    } else {
#pragma omp simd
      for (int i = 0; i < count; ++i) to[i * stride] = encode(from[i]);
    }
  });
}

FD_HOST_DEVICE float unchanged(float x) { return x; }

// The run in memory, if its values can be used there; else null.
inline float* in_place(const Operand& o, const Size& size, const Run& run) {
  if (!o.data || o.dtype != DType::f32 || !is_dense(o, size)) return nullptr;
  return static_cast<float*>(o.data) + run.sample * o.stride[0] + run.first;
}

// The run's values: in place, or in the buffer; null if the operand is absent.
FD_NOINLINE const float* read(const Operand& o, const Size& size, const Run& run, Buffer& buffer) {
  if (!o.data) return nullptr;
  if (const float* values = in_place(o, size, run)) return values;
  if (o.dtype == DType::bf16)
    gather<uint16_t, from_bf16>(o, size, run, buffer.at);
  else if (o.dtype == DType::f16)
    gather<uint16_t, from_f16>(o, size, run, buffer.at);
  else
    gather<float, unchanged>(o, size, run, buffer.at);
  return buffer.at;
}

// Where to compute the run's values: in place if they can stay there, else in the buffer.
inline float* place(const Operand& o, const Size& size, const Run& run, Buffer& buffer) {
  float* values = in_place(o, size, run);
  return values ? values : buffer.at;
}

// Brings values to the operand, unless they are in place or it is absent.
FD_NOINLINE void write(const Operand& o, const Size& size, const Run& run, const float* values) {
  if (!o.data || values == in_place(o, size, run)) return;
  if (o.dtype == DType::bf16)
    scatter<uint16_t, to_bf16>(o, size, run, values);
  else if (o.dtype == DType::f16)
    scatter<uint16_t, to_f16>(o, size, run, values);
  else
    scatter<float, unchanged>(o, size, run, values);
}

// How an op's elements are cut into runs. Where the last dimension is long, runs of its parallel
// lines follow each other, so that the channels of an image share what a cache line brings.
struct Runs {
  int64_t lines, length, chunks, count;

  explicit Runs(const Size& size)
      : lines(size.of[3] >= kRun / 4 ? size.of[1] * size.of[2] : 1),
        length(size.sample() / lines),
        chunks((length + kRun - 1) / kRun),
        count(size.of[0] * chunks * lines) {}

  Run operator[](int64_t i) const {
    const int64_t line = i % lines, chunk = i / lines % chunks;
    const int64_t left = length - chunk * kRun;
    return {i / lines / chunks, line * length + chunk * kRun,
            static_cast<int>(left < kRun ? left : kRun)};
  }
};

// body(run) for all elements; on several threads if they are many.
template <class Body>
inline void for_runs(const Size& size, const Body& body) {
  if (size.all() == 0) return;
  const Runs runs(size);
  for_each(runs.count, size.all() >= kLarge, [&](int64_t i) { body(runs[i]); });
}

}  // namespace
}  // namespace fd
