// Fewer and longer dimensions, for ops to which the order of the elements is nothing.
#pragma once

#include "tensor.h"

namespace fd {
namespace {

// Puts dimensions `from` to 3 in the order of the first operand's memory, and joins neighbours that
// every operand walks in one stride: a channels-last image becomes a line.
template <int operands>
inline void simplify(int from, Size& size, Operand* const (&all)[operands]) {
  const auto move = [&](int d, int to) {  // to a lower place; those between go one up
    if (d == to) return;
    const auto rotate = [&](int64_t* v) {
      const int64_t moved = v[d];
      for (int k = d; k > to; --k) v[k] = v[k - 1];
      v[to] = moved;
    };
    rotate(size.of);
    for (Operand* o : all) rotate(o->stride);
  };
  const auto joins = [&](int d) {  // with the next
    if (size.of[d] == 1) return true;
    for (const Operand* o : all)
      if (o->data && o->stride[d] != o->stride[d + 1] * size.of[d + 1]) return false;
    return true;
  };
  const auto span = [&](int d) { return size.of[d] == 1 ? INT64_MAX : all[0]->stride[d]; };
  for (int d = from + 1; d < 4; ++d) {
    int to = d;
    while (to > from && span(to - 1) < span(d)) --to;
    move(d, to);
  }
  int last = 3;
  for (int joined = from; joined < 3; ++joined) {
    if (joins(last - 1)) {
      size.of[last] *= size.of[last - 1];
      size.of[last - 1] = 1;
      move(last - 1, from);
    } else {
      --last;
    }
  }
}

}  // namespace
}  // namespace fd
