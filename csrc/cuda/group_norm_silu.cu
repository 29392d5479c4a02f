// Two kernels: the moments of parts of each group, then, from their sums, the map of each channel.
// The second read of x comes from the L2 cache where x fits into it. Parts depend on the shape
// alone, so a sample's result is the same bits in any batch.
//
// Where pixels are adjacent, a block has a part of one group. Where channels are, a group can be a
// few bytes of each pixel: there a block has a slab, whole groups that are about 64 bytes wide.
#include "../group_norm_silu.h"

#include <numeric>

#include "launch.h"
#include "memory.h"

namespace fd {
namespace gpu {
namespace {

constexpr int kMaps = 256;  // channels whose maps a block has at a time

struct Moments {
  double sum, square;
};

struct Shared {
  Moments part[kThreads], unit[kMaps];
  Normal normal[kMaps];
  Affine map[kMaps];
};

FD_DEVICE Shared& shared() {
  __shared__ Shared memory;
  return memory;
}

// How a group or a slab is cut: `length` of its elements, or of its pixels, are a part.
struct Cut {
  int64_t parts, length;
  Moments* scratch;  // [samples, groups, kParts]
};

Cut cut_of(int64_t count, int64_t least, void* scratch) {
  const int64_t steps = (count + least * kParts - 1) / (least * kParts);
  const int64_t length = std::max<int64_t>(1, steps) * least;
  return {(count + length - 1) / length, length, static_cast<Moments*>(scratch)};
}

// The sum over `lanes` threads, `columns` apart, for the first; the order is always the same.
FD_DEVICE Moments sum_of_lanes(const Moments& mine, int lanes, int columns) {
  Moments* const part = shared().part;
  const int t = static_cast<int>(threadIdx.x), lane = t / columns;
  __syncthreads();  // others may still read what is there
  part[t] = mine;
  for (int left = lanes; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (lane + half < left) {
      part[t].sum += part[t + half * columns].sum;
      part[t].square += part[t + half * columns].square;
    }
    left = half;
  }
  return part[t];
}

// Adds the first `count` of the pack: distances from its first element lose nothing in float32.
FD_DEVICE void add(Moments& to, const Pack& x, int count) {
  float sum = 0, square = 0;
  each([&](int i) {
    const float distance = i < count ? x.at[i] - x.at[0] : 0.0f;
    sum += distance;
    square = FD_FMA(distance, distance, square);
  });
  if (count > 0) add_shifted(to.sum, to.square, count, x.at[0], sum, square);
}

FD_DEVICE Normal group_normal(const GroupNormSilu& op, const Cut& cut, int64_t group) {
  Moments total = {0, 0};
  for (int64_t part = 0; part < cut.parts; ++part) {
    total.sum += cut.scratch[group * kParts + part].sum;
    total.square += cut.scratch[group * kParts + part].square;
  }
  const double count = static_cast<double>(op.channels / op.groups * op.pixels);
  return normal_of(count, total.sum, total.square, op.eps);
}

FD_DEVICE float parameter(const Operand& o, int64_t sample, int64_t channel, float absent) {
  return o.data ? load(o.data, o.dtype, sample * o.stride[0] + channel * o.stride[1]) : absent;
}

FD_DEVICE Affine map_of(const GroupNormSilu& op, const Normal& normal, int64_t sample, int64_t c) {
  return affine_of(normal, parameter(op.weight, 0, c, 1), parameter(op.bias, 0, c, 0),
                   parameter(op.scale, sample, c, 0), parameter(op.shift, sample, c, 0));
}

// The hardware's own exponential and division, right to about 1e-6, are enough for 16 bits.
template <DType dtype>
FD_DEVICE float mapped(const GroupNormSilu& op, const Affine& k, float x) {
  const float y = group_norm_silu_element<false>(k.a, k.b, x);
  if (!op.silu) return y;
  return dtype == DType::f32 ? silu(y) : __fdividef(y, 1.0f + __expf(-y));
}

// Where pixels are adjacent, or nothing else fits. Packs of adjacent elements if they are wide,
// else of elements a block's width apart.
template <DType dtype>
struct ByGroup {
  const GroupNormSilu& op;
  int64_t per_group = op.channels / op.groups, sample = blockIdx.x / op.groups,
          group = blockIdx.x % op.groups, first = group * per_group;
  int apart = op.x.wide ? 1 : static_cast<int>(kThreads);

  // body(element, count) for the packs of a range of elements, that is channel pixels + pixel.
  template <class Body>
  FD_DEVICE void for_packs(int64_t from, int64_t end, Body body) const {
    const int64_t start = from + int64_t{threadIdx.x} * (op.x.wide ? kPack : 1);
    for (int64_t e = start; e < end; e += int64_t{kPack} * kThreads) {
      const int64_t left = (end - e + apart - 1) / apart;
      body(e, left < kPack ? static_cast<int>(left) : kPack);
    }
  }

  FD_DEVICE int64_t offset(const Operand& o, int64_t element) const {
    return sample * o.stride[0] + (first + element / op.pixels) * o.stride[1] +
           element % op.pixels * o.stride[2];
  }

  FD_DEVICE Pack read(int64_t element, int count) const {
    if (op.x.wide) return load_wide(op.x.data, dtype, offset(op.x, element));
    Pack x = {};
    each([&](int i) {
      if (i < count) x.at[i] = load(op.x.data, dtype, offset(op.x, element + i * apart));
    });
    return x;
  }

  FD_DEVICE void moments(const Cut& cut) const {
    const int64_t from = blockIdx.y * cut.length;
    Moments mine = {0, 0};
    for_packs(from, min(from + cut.length, per_group * op.pixels),
              [&](int64_t e, int count) { add(mine, read(e, count), count); });
    const Moments total = sum_of_lanes(mine, kThreads, 1);
    if (threadIdx.x == 0) cut.scratch[blockIdx.x * kParts + blockIdx.y] = total;
  }

  FD_DEVICE void map(const Cut& cut) const {
    Shared& s = shared();
    if (threadIdx.x == 0) s.normal[0] = group_normal(op, cut, blockIdx.x);
    const int64_t from = blockIdx.y * cut.length;
    const int64_t end = min(from + cut.length, per_group * op.pixels);
    for (int64_t c = from / op.pixels; c * op.pixels < end; c += kMaps) {
      __syncthreads();
      if (threadIdx.x < min(int64_t{kMaps}, per_group - c))
        s.map[threadIdx.x] = map_of(op, s.normal[0], sample, first + c + threadIdx.x);
      __syncthreads();
      for_packs(max(from, c * op.pixels), min(end, (c + kMaps) * op.pixels),
                [&](int64_t e, int count) { apply(e, count, s.map, c); });
    }
  }

  FD_DEVICE void apply(int64_t e, int count, const Affine* map, int64_t c) const {
    if (op.x.wide) {
      Pack x = load_wide(op.x.data, dtype, offset(op.x, e));
      const Affine k = map[e / op.pixels - c];
      each([&](int i) { x.at[i] = mapped<dtype>(op, k, x.at[i]); });
      return store_wide(op.out.data, dtype, offset(op.out, e), x);
    }
#pragma unroll 2
    for (int i = 0; i < count; ++i, e += apart) {
      const float x = load(op.x.data, dtype, offset(op.x, e));
      store(op.out.data, dtype, offset(op.out, e),
            mapped<dtype>(op, map[e / op.pixels - c], x));
    }
  }
};

// Where channels are adjacent. A thread has the same pack of channels, a column, of many pixels.
template <DType dtype>
struct BySlab {
  const GroupNormSilu& op;
  int width;  // channels
  int per_group = static_cast<int>(op.channels / op.groups), columns = width / kPack,
      lanes = kThreads / columns, column = threadIdx.x % columns, lane = threadIdx.x / columns;
  int64_t slabs = op.channels / width, sample = blockIdx.x / slabs,
          first = blockIdx.x % slabs * width, group = (sample * op.channels + first) / per_group;

  FD_DEVICE int64_t offset(const Operand& o, int64_t pixel) const {
    return sample * o.stride[0] + pixel * o.stride[2] + first + column * kPack;
  }

  // body(pixel) for the thread's pixels of this part.
  template <class Body>
  FD_DEVICE void for_pixels(const Cut& cut, Body body) const {
    const int64_t from = blockIdx.y * cut.length, end = min(from + cut.length, op.pixels);
    if (lane >= lanes) return;
#pragma unroll 1
    for (int64_t pixel = from + lane; pixel < end; pixel += lanes) body(pixel);
  }

  FD_DEVICE void moments(const Cut& cut) const {
    Pack shift = {}, sum = {}, square = {};
    int count = 0;
    for_pixels(cut, [&](int64_t pixel) {
      const Pack x = load_wide(op.x.data, dtype, offset(op.x, pixel));
      if (count++ == 0) shift = x;
      each([&](int i) {
        const float distance = x.at[i] - shift.at[i];
        sum.at[i] += distance;
        square.at[i] = FD_FMA(distance, distance, square.at[i]);
      });
    });
    // units are what a pack and a group have in common
    const int unit = per_group % 8 == 0 ? 8 : per_group % 4 == 0 ? 4 : per_group % 2 == 0 ? 2 : 1;
    Moments* const units = shared().unit;
    Moments mine = {0, 0};
    each([&](int i) {
      add_shifted(mine.sum, mine.square, count, shift.at[i], sum.at[i], square.at[i]);
      if ((i + 1) % unit) return;
      const Moments total = sum_of_lanes(mine, lanes, columns);
      if (lane == 0) units[(column * kPack + i) / unit] = total;
      mine = {0, 0};
    });
    __syncthreads();
    const int g = static_cast<int>(threadIdx.x);
    if (g >= width / per_group) return;
    Moments total = {0, 0};
    for (int u = g * per_group / unit; u < (g + 1) * per_group / unit; ++u) {
      total.sum += units[u].sum;
      total.square += units[u].square;
    }
    cut.scratch[(group + g) * kParts + blockIdx.y] = total;
  }

  FD_DEVICE void map(const Cut& cut) const {
    Shared& s = shared();
    const int t = static_cast<int>(threadIdx.x);
    if (t < width / per_group) s.normal[t] = group_normal(op, cut, group + t);
    __syncthreads();
    if (t < width) s.map[t] = map_of(op, s.normal[t / per_group], sample, first + t);
    __syncthreads();
    Affine k[kPack];
    each([&](int i) { k[i] = s.map[column * kPack + i]; });
    for_pixels(cut, [&](int64_t pixel) {
      Pack x = load_wide(op.x.data, dtype, offset(op.x, pixel));
      each([&](int i) { x.at[i] = mapped<dtype>(op, k[i], x.at[i]); });
      store_wide(op.out.data, dtype, offset(op.out, pixel), x);
    });
  }
};

template <DType dtype>
__global__ void __launch_bounds__(kThreads) moments_kernel(GroupNormSilu op, Cut cut, int slab) {
  if (slab)
    BySlab<dtype>{op, slab}.moments(cut);
  else
    ByGroup<dtype>{op}.moments(cut);
}

template <DType dtype>
__global__ void __launch_bounds__(kThreads) map_kernel(GroupNormSilu op, Cut cut, int slab) {
  if (slab)
    BySlab<dtype>{op, slab}.map(cut);
  else
    ByGroup<dtype>{op}.map(cut);
}

// The width of a slab, or 0 where it would be too wide, or x does not lie so.
int slab_of(const GroupNormSilu& op) {
  if (op.x.stride[1] != 1 || op.out.stride[1] != 1 || op.channels % kPack) return 0;
  const bool pixels = op.pixels > 1, samples = op.samples > 1;
  for (const Operand* o : {&op.x, &op.out})
    if (!is_aligned(*o, {pixels ? o->stride[2] : 0, samples ? o->stride[0] : 0})) return 0;
  const int64_t least = std::lcm(op.channels / op.groups, int64_t{kPack});
  if (op.channels % least || least > kMaps) return 0;
  int64_t width = least;
  for (int64_t more = least; more * bytes_of(op.x.dtype) <= 64; more += least)
    if (op.channels % more == 0) width = more;
  return static_cast<int>(width);
}

bool rows_are_wide(const GroupNormSilu& op) {
  if (op.x.stride[2] != 1 || op.out.stride[2] != 1 || op.pixels % kPack) return false;
  return is_aligned(op.x, {op.x.stride[1], op.x.stride[0]}) &&
         is_aligned(op.out, {op.out.stride[1], op.out.stride[0]});
}

template <DType dtype>
void run_as(GroupNormSilu op, void* scratch, const Queue& queue) {
  const OnDevice on(queue.device);
  const int slab = slab_of(op);
  op.x.wide = !slab && rows_are_wide(op);
  // at least four pixels of a slab, or two packs of a group, for each thread
  const Cut cut = slab ? cut_of(op.pixels, 4 * (int64_t{kThreads} * kPack / slab), scratch)
                       : cut_of(op.channels / op.groups * op.pixels, 2 * kPack * kThreads, scratch);
  const int64_t pieces = op.samples * (slab ? op.channels / slab : op.groups);
  const dim3 blocks(static_cast<unsigned>(pieces), static_cast<unsigned>(cut.parts));
  launch(queue, blocks, kThreads, moments_kernel<dtype>, op, cut, slab);
  launch(queue, blocks, kThreads, map_kernel<dtype>, op, cut, slab);
}

}  // namespace

void group_norm_silu(GroupNormSilu op, void* scratch, Queue queue) {
  if (op.samples * op.channels * op.pixels == 0) return;
  if (op.x.dtype == DType::bf16)
    run_as<DType::bf16>(op, scratch, queue);
  else if (op.x.dtype == DType::f16)
    run_as<DType::f16>(op, scratch, queue);
  else
    run_as<DType::f32>(op, scratch, queue);
}

}  // namespace gpu
}  // namespace fd
