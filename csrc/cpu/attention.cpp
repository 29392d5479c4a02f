// Blocks of keys against blocks of queries, with the softmax taken as the blocks come (Dao et al.
// 2022; Milakov & Gimelshein 2018): what is kept of a query is its largest logit, its sum and its
// output so far, so that memory does not grow with queries times keys.
#include "../attention.h"

#include "kernels.h"

#if defined(__AVX512F__)
#include <algorithm>

#include "attention_block.h"
#include "parallel.h"
#include "scratch.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kSlab = 8;  // queries whose logits with a block of keys stay in L1

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class T>
struct Blocks {
  static constexpr int64_t kUnit = 4 / sizeof(T);  // elements in 32 bits

  const Attention& op;
  const int64_t depth = op.size / kUnit, columns = round_up(op.size, kVec);
  // Blocks of keys and values, and the outputs of a task's queries, fit L2 together.
  const int64_t block = op.size <= 128 ? 512 : op.size <= 256 ? 256 : 128;
  const int64_t line = block + kVec;  // of logits: no power of two
  const int64_t rows = queries_of_task();
  const int64_t tasks_of_head = (op.queries + rows - 1) / rows;

  int64_t queries_of_task() const {
    int64_t rows = op.size <= 64 ? 1024 : op.size <= 128 ? 512 : 256;
    const int64_t heads = op.batch * op.heads, threads = most_threads();
    const int64_t enough = threads == 1 ? 1 : 4 * threads;
    while (rows > 64 && heads * ((op.queries + rows - 1) / rows) < enough) rows /= 2;
    return rows;
  }

  static T* at(const Operand& o, int64_t batch, int64_t head) {
    return static_cast<T*>(o.data) + batch * o.stride[0] + head * o.stride[1];
  }

  void task(int64_t batch, int64_t head, int64_t first) const {
    const int64_t count = std::min(rows, op.queries - first);
    const int64_t k_bytes = 4 * depth * block, v_bytes = sizeof(T) * columns * block;
    char* memory = static_cast<char*>(scratch<0>(k_bytes + v_bytes + 4 * columns * rows +
                                                 8 * rows + kSlab * (8 * line + 4 * depth)));
    const auto take = [&memory](int64_t bytes) {
      char* taken = memory;
      memory += bytes;
      return taken;
    };
    T* k = reinterpret_cast<T*>(take(k_bytes));
    T* v = reinterpret_cast<T*>(take(v_bytes));
    float* out = reinterpret_cast<float*>(take(4 * columns * rows));
    float* largest = reinterpret_cast<float*>(take(4 * rows));
    float* sum = reinterpret_cast<float*>(take(4 * rows));
    float* logits = reinterpret_cast<float*>(take(4 * kSlab * line));
    T* weights = reinterpret_cast<T*>(take(4 * kSlab * line));
    T* edge = reinterpret_cast<T*>(take(4 * kSlab * depth));

    const T* q = at(op.q, batch, head) + first * op.q.stride[2];
    for (int64_t key = 0; key < op.keys; key += block) {
      const int64_t keys = std::min(block, op.keys - key);
      pack_keys(at(op.k, batch, head) + key * op.k.stride[2], op.k.stride[2], keys, op.size, k);
      pack_values(at(op.v, batch, head) + key * op.v.stride[2], op.v.stride[2], keys, op.size, v);
      for (int64_t row = 0; row < count; row += kSlab) {
        const int64_t present = std::min(kSlab, count - row);
        const T* from = q + row * op.q.stride[2];
        int64_t stride = op.q.stride[2];
        if (present < kSlab) {
          for (int64_t r = 0; r < kSlab; ++r)
            std::copy_n(from + std::min(r, present - 1) * stride, op.size, edge + r * op.size);
          from = edge, stride = op.size;
        }
        slab(from, stride, k, v, keys, key == 0, logits, weights, largest + row, sum + row,
             out + row * columns);
      }
    }
    for (int64_t row = 0; row < count; ++row)
      store_row(out + row * columns, 1.0f / sum[row], op.size,
                at(op.out, batch, head) + (first + row) * op.out.stride[2]);
    if (!op.lse) return;
    float* const lse = op.lse + (batch * op.heads + head) * op.queries + first;
    for (int64_t row = 0; row < count; ++row)
      lse[row] = op.scale * largest[row] + std::log(sum[row]);
  }

  void slab(const T* q, int64_t q_stride, const T* k, const T* v, int64_t keys, bool first,
            float* logits, T* weights, float* largest, float* sum, float* out) const {
    const float to_base_2 = op.scale * 1.44269504f;
    for (int64_t key = 0; key < keys; key += kKeyPanel)
      multiply<kKeyPanel / kVec>(q, q_stride, k + key * op.size, op.size, logits + key, line,
                                 nullptr);
    float shrink[kSlab];
    for (int64_t r = 0; r < kSlab; ++r) {
      const float* row = logits + r * line;
      const float here = largest_of(row, keys);
      const float most = first || here > largest[r] ? here : largest[r];
      shrink[r] = first ? 0.0f : exponential_of_2(to_base_2 * (largest[r] - most));
      largest[r] = most;
      T* const to = weights + r * line;
      const float added = sizeof(T) == 2 && !op.lse
                              ? exponentials<3>(row, keys, to_base_2, most, to)
                              : exponentials<5>(row, keys, to_base_2, most, to);
      sum[r] = first ? added : FD_FMA(sum[r], shrink[r], added);
    }
    multiply_values(weights, line, v, round_up(keys, kUnit), out, columns,
                    first ? nullptr : shrink);
  }

  void run() const {
    const int64_t work = op.batch * op.heads * op.queries * op.keys * op.size;
    for_each(op.batch * op.heads * tasks_of_head, work >= 16 * kLarge, [&](int64_t i) {
      const int64_t at = i / tasks_of_head;
      task(at / op.heads, at % op.heads, i % tasks_of_head * rows);
    });
  }
};

}  // namespace

bool attention_runs(DType dtype) {
  return dtype == DType::f32 || (dtype == DType::bf16 && __builtin_cpu_supports("avx512bf16"));
}

void attention(Attention op) {
  if (op.batch * op.heads * op.queries == 0) return;
  if (op.q.dtype == DType::bf16)
    Blocks<uint16_t>{op}.run();
  else
    Blocks<float>{op}.run();
}

}  // namespace FD_ISA
}  // namespace fd

#else

namespace fd {
namespace FD_ISA {

bool attention_runs(DType) { return false; }
void attention(Attention) {}

}  // namespace FD_ISA
}  // namespace fd

#endif
