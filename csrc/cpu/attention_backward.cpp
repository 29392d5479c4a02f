// Blocks of keys against blocks of queries, as in attention (Dao et al. 2022): a slab of eight keys
// makes its logits with a block of queries, from them p and ds, and adds to its gradients; what the
// queries' gradient gets from a block of keys is one product, which is summed turned.
#include "../attention.h"

#include "kernels.h"

#if defined(__AVX512F__)
#include <algorithm>

#include "attention_backward_block.h"
#include "parallel.h"
#include "scratch.h"

namespace fd {
namespace FD_ISA {
namespace {

constexpr int64_t kSlab = 8;
constexpr int64_t kTasks = 16;  // fewer heads are cut by their keys

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class T>
struct Blocks {
  static constexpr int64_t kUnit = 4 / sizeof(T);  // elements in 32 bits
  static constexpr int64_t kKeys = 128;            // in a block
  static constexpr int64_t kKeyLine = kKeys + kVec * kUnit;

  const AttentionBackward& op;
  const Attention& of = op.of;
  const int64_t columns = round_up(of.size, kVec), heads = of.batch * of.heads;
  // q and grad of a block, packed in both ways, are half of L2
  const int64_t fitting = 512 * 1024 / static_cast<int64_t>(4 * sizeof(T) * of.size);
  const int64_t block = std::clamp<int64_t>(fitting / kKeyPanel * kKeyPanel, kKeyPanel, 256);
  const int64_t line = block + kVec;  // of logits: no power of two
  const int64_t blocks = (of.queries + block - 1) / block;
  const int64_t key_blocks = (of.keys + kKeys - 1) / kKeys;
  const int64_t parts = std::clamp<int64_t>(kTasks / std::max<int64_t>(heads, 1), 1, key_blocks);
  const int64_t turned = blocks * of.size * line;  // elements of a head's queries' gradient

  T* at(const Operand& o, int64_t head, int64_t token) const {
    return static_cast<T*>(o.data) + head / of.heads * o.stride[0] + head % of.heads * o.stride[1] +
           token * o.stride[2];
  }

  struct Memory {
    T *q, *grad, *q_values, *grad_values, *turned_k, *packed, *p, *ds, *edge_k, *edge_v;
    float *s, *dp, *lse, *d, *grad_k, *grad_v, *grad_q;
  };

  Memory memory(bool with_grad_q) const {
    const int64_t wide = block * of.size, values = block * columns, sums = kKeys * columns;
    const int64_t narrow = 2 * wide + 2 * values + of.size * kKeyLine + block * kKeys +
                           2 * kSlab * line + 2 * kSlab * of.size;
    const int64_t full = 2 * kSlab * line + 2 * block + 2 * sums + with_grad_q * turned;
    T* t = static_cast<T*>(scratch<0>(narrow * sizeof(T) + full * sizeof(float) + 64));
    const auto take = [&t](int64_t count) { return (t += count) - count; };
    Memory m;
    m.q = take(wide), m.grad = take(wide);
    m.q_values = take(values), m.grad_values = take(values);
    m.packed = take(block * kKeys), m.turned_k = take(of.size * kKeyLine);
    m.p = take(kSlab * line), m.ds = take(kSlab * line);
    m.edge_k = take(kSlab * of.size), m.edge_v = take(kSlab * of.size);
    float* f = reinterpret_cast<float*>(t);
    const auto take_floats = [&f](int64_t count) { return (f += count) - count; };
    m.s = take_floats(kSlab * line), m.dp = take_floats(kSlab * line);
    m.lse = take_floats(block), m.d = take_floats(block);
    m.grad_k = take_floats(sums), m.grad_v = take_floats(sums);
    m.grad_q = f;
    return m;
  }

  // What is needed of `count` queries from `first` on.
  void pack(const Memory& m, int64_t head, int64_t first, int64_t count) const {
    const T *q = at(of.q, head, first), *grad = at(op.grad, head, first);
    pack_keys(q, of.q.stride[2], count, of.size, m.q);
    pack_keys(grad, op.grad.stride[2], count, of.size, m.grad);
    pack_values(q, of.q.stride[2], count, of.size, m.q_values);
    pack_values(grad, op.grad.stride[2], count, of.size, m.grad_values);
    std::fill_n(m.lse, block, 0.0f);
    std::fill_n(m.d, block, 0.0f);
    for (int64_t row = 0; row < count; ++row) {
      m.lse[row] = kToBase2 * of.lse[head * of.queries + first + row];
      m.d[row] = dot(grad + row * op.grad.stride[2], at(of.out, head, first + row), of.size);
    }
  }

  // Eight rows of keys or values; after the last, that one again.
  const T* eight(const Operand& o, int64_t head, int64_t key, T* edge, int64_t& stride) const {
    stride = o.stride[2];
    if (key + kSlab <= of.keys) return at(o, head, key);
    for (int64_t r = 0; r < kSlab; ++r)
      std::copy_n(at(o, head, std::min(key + r, of.keys - 1)), of.size, edge + r * of.size);
    stride = of.size;
    return edge;
  }

  // Eight keys from `key` on, the `row`-th of their block, against a block of queries.
  void slab(const Memory& m, int64_t head, int64_t key, int64_t row, int64_t count,
            bool first) const {
    int64_t k_stride, v_stride;
    const T* k = eight(of.k, head, key, m.edge_k, k_stride);
    const T* v = eight(of.v, head, key, m.edge_v, v_stride);
    for (int64_t query = 0; query < count; query += kKeyPanel) {
      multiply<2>(k, k_stride, m.q + query * of.size, of.size, m.s + query, line, nullptr);
      multiply<2>(v, v_stride, m.grad + query * of.size, of.size, m.dp + query, line, nullptr);
    }
    const Softmax softmax = {kToBase2 * of.scale, m.lse, m.d, line, kKeyPanel * kKeys};
    for (int64_t r = 0; r < kSlab; r += kUnit)
      softmax(m.s + r * line, m.dp + r * line, count, m.p + r * line, m.ds + r * line,
              m.packed + (row + r) * kKeyPanel);
    const int64_t terms = round_up(count, kUnit);
    const float* scale = first ? nullptr : kOnes;
    multiply_values(m.p, line, m.grad_values, terms, m.grad_v + row * columns, columns, scale);
    multiply_values(m.ds, line, m.q_values, terms, m.grad_k + row * columns, columns, scale);
  }

  // Blocks of keys of a head, `first` to `last`; their share of grad_q goes to, or is added to,
  // `grad_q`.
  void keys(const Memory& m, int64_t head, int64_t first, int64_t last, float* grad_q) const {
    for (int64_t key = first * kKeys; key < std::min(last * kKeys, of.keys); key += kKeys) {
      const int64_t count = std::min(kKeys, of.keys - key), whole = round_up(count, kSlab);
      turn(at(of.k, head, key), of.k.stride[2], count, of.size, m.turned_k, kKeyLine);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t queries = std::min(block, of.queries - b * block);
        pack(m, head, b * block, queries);
        for (int64_t row = 0; row < whole; row += kSlab)
          slab(m, head, key + row, row, queries, b == 0);
        for (int64_t query = 0; query < queries; query += kKeyPanel)
          for (int64_t c = 0; c < of.size; c += kSlab)
            multiply<2>(m.turned_k + c * kKeyLine, kKeyLine, m.packed + query * kKeys, whole,
                        grad_q + (b * of.size + c) * line + query, line,
                        key == first * kKeys ? nullptr : kOnes);
      }
      for (int64_t row = 0; row < count; ++row) {
        store_row(m.grad_k + row * columns, of.scale, of.size, at(op.grad_k, head, key + row));
        store_row(m.grad_v + row * columns, 1.0f, of.size, at(op.grad_v, head, key + row));
      }
    }
  }

  void store(int64_t head, const float* grad_q) const {
    for (int64_t b = 0; b < blocks; ++b)
      store_turned(grad_q + b * of.size * line, line, std::min(block, of.queries - b * block),
                   of.size, of.scale, at(op.grad_q, head, b * block), op.grad_q.stride[2]);
  }

  void run() const {
    const bool large = heads * of.queries * of.keys * of.size >= 16 * kLarge;
    if (parts == 1)
      return for_each(heads, large, [&](int64_t head) {
        const Memory m = memory(true);
        keys(m, head, 0, key_blocks, m.grad_q);
        store(head, m.grad_q);
      });
    float* const shares = static_cast<float*>(scratch<1>(heads * parts * turned * sizeof(float)));
    for_each(heads * parts, large, [&](int64_t i) {
      keys(memory(false), i / parts, key_blocks * (i % parts) / parts,
           key_blocks * (i % parts + 1) / parts, shares + i * turned);
    });
    for_each(heads, large, [&](int64_t head) {
      float* const sum = shares + head * parts * turned;
      for (int64_t i = turned; i < parts * turned; ++i) sum[i % turned] += sum[i];
      store(head, sum);
    });
  }
};

}  // namespace

void attention_backward(AttentionBackward op) {
  if (op.of.q.dtype == DType::bf16)
    Blocks<uint16_t>{op}.run();
  else
    Blocks<float>{op}.run();
}

}  // namespace FD_ISA
}  // namespace fd

#else

namespace fd {
namespace FD_ISA {

void attention_backward(AttentionBackward) {}

}  // namespace FD_ISA
}  // namespace fd

#endif
