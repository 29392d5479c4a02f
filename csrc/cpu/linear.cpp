// A block of rows, which stays in L2, with one panel of 32 outputs after another: a panel's
// weights come from L3 once a block.
#include "../linear.h"

#include "kernels.h"

#if defined(__AVX2__)
#include <algorithm>

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace fd {
namespace FD_ISA {
namespace {

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);
template <class T>
constexpr int64_t kChunk = sizeof(T) == 4 ? 128 : 256;  // terms summed at once
constexpr int64_t kBlock = 128 << 10;  // bytes of a block of rows

// Columns `from` to `to` of rows, to L2: to read (0) or to write (1).
template <int write, class T>
inline void fetch_rows(const T* row, int64_t stride, int64_t rows, int64_t from, int64_t to) {
  for (; rows > 0; --rows, row += stride)
    for (int64_t c = from; c < to; c += kLine<T>) __builtin_prefetch(row + c, write, 2);
}

template <int count>
FD_MEMBER void put(float* to, const Vec (&sum)[count]) {
  for (int n = 0; n < count; ++n) store(to + n * kVec, sum[n]);
}

#if defined(__AVX512F__)
FD_BF16 FD_MEMBER void put(uint16_t* to, const Vec (&sum)[2]) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(sum[1].v, sum[0].v));
}
#endif

// out = products so far, if there are any, + sums + bias + residual, for a panel.
template <class T>
struct Finish {
  const float* products;
  Vec bias[2];
  const T* residual;
  int64_t residual_stride;
  T* out;
  int64_t stride;

  template <int count>
  FD_BF16 FD_MEMBER void operator()(int64_t row, int column, const Vec (&sums)[count]) const {
    Vec sum[count];
    for (int n = 0; n < count; ++n) {
      const int64_t c = column + n * kVec;
      sum[n] = products ? load(products + row * kPanel + c) + sums[n] : sums[n];
      sum[n] = sum[n] + bias[c / kVec];
      if (residual) sum[n] = sum[n] + load(residual + row * residual_stride + c);
    }
    put(out + row * stride + column, sum);
  }

  void fetch(int64_t row, int64_t rows) const {
    fetch_rows<1>(out + row * stride, stride, rows, 0, kPanel);
    if (residual)
      fetch_rows<0>(residual + row * residual_stride, residual_stride, rows, 0, kPanel);
  }
};

// T: float, or uint16_t for bfloat16.
template <class T>
struct Layer {
  const Linear& op;
  const int64_t depth = op.inputs, panels = op.outputs / kPanel;
  const int64_t chunks = (depth + kChunk<T> - 1) / kChunk<T>;
  const int64_t fit = kBlock / static_cast<int64_t>(depth * sizeof(T));
  const int64_t most = std::clamp<int64_t>(fit, 32, 256) / kRows * kRows;  // rows of a block
  const int64_t blocks = (op.rows + most - 1) / most;

  static T* at(const Operand& o, int64_t sample, int64_t row, int64_t column) {
    return static_cast<T*>(o.data) + sample * o.stride[0] + row * o.stride[1] + column;
  }

  void run(int64_t sample, int64_t block, int64_t panel) const {
    const int64_t from = block * most, rows = std::min(most, op.rows - from);
    const int64_t column = panel * kPanel;
    const T* const x = at(op.x, sample, from, 0);
    const T* const weight = static_cast<const T*>(op.weight) + column * depth;
    const float* const bias = op.bias ? op.bias + column : nullptr;
    float* const products = static_cast<float*>(scratch<0>(rows * kPanel * sizeof(float)));
    const Finish<T> finish = {chunks > 1 ? products : nullptr,
                              {bias ? load(bias) : Vec{}, bias ? load(bias + kVec) : Vec{}},
                              op.residual.data ? at(op.residual, sample, from, column) : nullptr,
                              op.residual.stride[1],
                              at(op.out, sample, from, column),
                              op.out.stride[1]};
    const int64_t stride = op.x.stride[1];
    // The rows of the next block come while this one is at work, some columns at each step.
    const T* const next = from + most < op.rows ? at(op.x, sample, from + most, 0) : nullptr;
    const int64_t lines = (depth + kLine<T> - 1) / kLine<T>, steps = panels * chunks;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t c = chunk * kChunk<T>, terms = std::min(depth - c, kChunk<T>);
      const int64_t step = panel * chunks + chunk;
      const int64_t first = lines * step / steps * kLine<T>;
      const int64_t last = lines * (step + 1) / steps * kLine<T>;
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t count = std::min<int64_t>(rows - r, kRows);
        if (chunk == 0) finish.fetch(r, count);
        if (next) fetch_rows<0>(next + r * stride, stride, count, first, last);
        const T* const a = x + r * stride + c;
        const T* const b = weight + c * kPanel;
        if (chunk + 1 < chunks)
          multiply(count, a, stride, b, terms, Keep{products, chunk > 0}, r);
        else
          multiply(count, a, stride, b, terms, finish, r);
      }
    }
  }

  void run() const {
    const bool large = op.samples * op.rows * depth * op.outputs >= kLarge * 64;
    for_each(op.samples * blocks * panels, large, [&](int64_t i) {
      const int64_t block = i / panels;
      run(block / blocks, block % blocks, i % panels);
    });
  }
};

// Samples that follow one another as their rows do are one sample.
Linear merged(Linear op) {
  for (const Operand* o : {&op.x, &op.residual, &op.out})
    if (o->data && o->stride[0] != op.rows * o->stride[1]) return op;
  op.rows *= op.samples;
  op.samples = 1;
  return op;
}

}  // namespace

bool linear_runs(DType dtype) { return conv3x3_runs(dtype); }

void linear(Linear op) {
  op = merged(op);
  if (op.rows == 0) return;
  if (op.dtype == DType::f32) return Layer<float>{op}.run();
#if defined(__AVX512F__)
  Layer<uint16_t>{op}.run();
#endif
}

}  // namespace FD_ISA
}  // namespace fd

#else

namespace fd {
namespace FD_ISA {

bool linear_runs(DType) { return false; }
void linear(Linear) {}

}  // namespace FD_ISA
}  // namespace fd

#endif
