// A tensor of the tests: any layout, one element off alignment, with every element between and
// around its own watched.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../tensor.h"

namespace fd {

enum class Layout { dense, gaps, channels_last, strided };  // gaps: between the samples

constexpr Layout kLayouts[] = {Layout::dense, Layout::gaps, Layout::channels_last,
                               Layout::strided};

class Field {
 public:
  Field(const Size& size, DType dtype, Layout layout, unsigned seed = 0)
      : size_(size), dtype_(dtype) {
    const int64_t *n = size.of, sample = size.sample();
    const bool last = layout == Layout::channels_last;
    const int64_t step = layout == Layout::strided ? 2 : 1;
    const int64_t dense[] = {sample, n[2] * n[3], n[3], 1};
    const int64_t by_channel[] = {sample, 1, n[3] * n[1], n[1]};
    for (int d = 0; d < 4; ++d) stride_[d] = step * (last ? by_channel : dense)[d];
    if (layout == Layout::gaps) stride_[0] += 5;
    storage_.assign(stride_[0] * n[0] + 2 * kGuard, dtype == DType::f32 ? kMark : kMark & 0xffff);
    narrow_.assign(storage_.begin(), storage_.end());
    uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
    if (seed)
      each([&](int64_t, int64_t, int64_t at) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        put(at, static_cast<float>(static_cast<int64_t>(state) * 0x1p-62));  // within +-2
      });
  }

  Operand operand() {
    Operand o = {dtype_ == DType::f32 ? static_cast<void*>(storage_.data() + kGuard)
                                      : narrow_.data() + kGuard,
                 dtype_,
                 {stride_[0], stride_[1], stride_[2], stride_[3]}};
    return o;
  }

  double get(int64_t sample, int64_t element) const { return value(place(sample, element)); }

  // Whether an element that is not the tensor's was written.
  bool overrun() const {
    std::vector<bool> own(storage_.size());
    each([&](int64_t, int64_t, int64_t at) { own[at] = true; });
    for (size_t at = 0; at < own.size(); ++at)
      if (!own[at] && (storage_[at] & 0xffff) != (kMark & 0xffff)) return true;
    for (size_t at = 0; at < own.size(); ++at)
      if (!own[at] && narrow_[at] != (kMark & 0xffff)) return true;
    return false;
  }

  // body(sample, element, place in the storage), in the order of a contiguous tensor.
  template <class Body>
  void each(Body body) const {
    for (int64_t s = 0; s < size_.of[0]; ++s)
      for (int64_t e = 0; e < size_.sample(); ++e) body(s, e, place(s, e));
  }

  // The largest |value - expected| / (1 + |expected|), where both may be NaN.
  template <class Expected>
  double error(Expected expected) const {
    double worst = 0;
    each([&](int64_t s, int64_t e, int64_t at) {
      const double want = expected(s, e), got = value(at);
      const double error = std::abs(got - want) / (1 + std::abs(want));
      if (std::isnan(got) != std::isnan(want))
        worst = INFINITY;
      else if (error > worst)
        worst = error;
    });
    return worst;
  }

  double tolerance() const {
    return dtype_ == DType::f32 ? 2e-6 : dtype_ == DType::f16 ? 0x1p-11 : 0x1p-8;
  }

 private:
  static constexpr int64_t kGuard = 33;  // odd: no vector's alignment
  static constexpr uint32_t kMark = 0x7fc0abcd;  // a NaN: reading it shows

  int64_t place(int64_t sample, int64_t e) const {
    const int64_t* n = size_.of;
    return kGuard + sample * stride_[0] + e / (n[2] * n[3]) * stride_[1] +
           e / n[3] % n[2] * stride_[2] + e % n[3] * stride_[3];
  }

  void put(int64_t at, float x) {
    if (dtype_ == DType::f32)
      storage_[at] = bits_of(x);
    else
      narrow_[at] = dtype_ == DType::bf16 ? to_bf16(x) : to_f16(x);
  }

  double value(int64_t at) const {
    if (dtype_ == DType::f32) return float_of(storage_[at]);
    return dtype_ == DType::bf16 ? from_bf16(narrow_[at]) : from_f16(narrow_[at]);
  }

  Size size_;
  DType dtype_;
  int64_t stride_[4];
  std::vector<uint32_t> storage_;  // of float
  std::vector<uint16_t> narrow_;   // of the others
};

// Single elements, odd and even runs, one more and one less than the kernels' runs.
constexpr Size kSizes[] = {{{1, 1, 1, 1}},   {{3, 1, 1, 63}},   {{2, 3, 5, 7}},  {{2, 4, 16, 16}},
                           {{1, 2, 1, 1030}}, {{2, 1, 1, 2049}}, {{1, 3, 1, 1023}}};

}  // namespace fd
