#pragma once

#include <type_traits>

#include "baseline/csr.h"
#include "cuda/device/numeric.cuh"

// Row splitting: Yang, Buluc, Owens, "Design Principles for Sparse Matrix Multiplication on the GPU",
// Euro-Par 2018. A warp takes a row and a strip of columns and reads rows of X, so that all its loads
// are coalesced; unrolling keeps many of them under way. The entries that a warp needs are read 32 at
// a time and handed around. Where the columns are too few for 32 lanes, lanes share the entries of a
// row and add their sums up in a fixed order, and a warp takes several rows when rows are short.
namespace csb::baseline {

using cuda::AccOf;
using cuda::Vector;

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpBits = 5;
constexpr int kWarpSize = 1 << kWarpBits;
constexpr int kThreads = 128;
// Thread blocks a multiprocessor shall hold: the most for which nothing spills.
template <typename T, int kVec, bool kBroadcast>
constexpr int kMinBlocks = kBroadcast                           ? 4
                           : kVec == 1 && sizeof(AccOf<T>) == 4 ? 10
                                                                : 7;
constexpr int64_t kMaxGridY = 65535;
constexpr int kLoadBytes = 16;  // the widest load of a thread
constexpr int kWordBytes = 4;

// Lanes of a warp, lowest bits first: lane (a vector of columns each), split (lanes share the entries
// of a row), group (a row each).
struct LaneMap {
  int32_t lane_bits;
  int32_t split_bits;

  CSB_HOST_DEVICE int32_t lanes() const { return 1 << lane_bits; }
  CSB_HOST_DEVICE int32_t splits() const { return 1 << split_bits; }
  CSB_HOST_DEVICE int32_t group_bits() const { return lane_bits + split_bits; }
  CSB_HOST_DEVICE int32_t groups_per_block() const { return kThreads >> group_bits(); }
};

struct LanePlace {
  int32_t lane;
  int32_t split;
  int32_t group;  // in the thread block
  unsigned mask;  // the lanes of the group

  __device__ __forceinline__ explicit LanePlace(const LaneMap& map) {
    const int32_t thread = threadIdx.x;
    lane = thread & (map.lanes() - 1);
    split = (thread >> map.lane_bits) & (map.splits() - 1);
    group = thread >> map.group_bits();
    const int32_t size = 1 << map.group_bits();
    mask = (kFullWarp >> (kWarpSize - size)) << (thread & (kWarpSize - size));
  }
};

// What a lane holds after fold(): elements [first, first + count) of the sums, in front of its array.
struct Folded {
  int32_t first;
  int32_t count;
  bool owner;  // false when another lane holds the same
};

// Adds sums up over the lanes that differ in the bits `high`, high / 2, ... `low`. As long as a lane
// has several sums it hands one half of them over and keeps the other, so that few are exchanged.
template <typename Acc, int kCount>
__device__ __forceinline__ Folded fold(Acc (&sum)[kCount], int32_t high, int32_t low, unsigned mask) {
  static_assert((kCount & (kCount - 1)) == 0, "sums are halved");
  const int32_t lane_idx = threadIdx.x % kWarpSize;
  Folded folded = {0, kCount, true};
  int32_t offset = high;
#pragma unroll
  for (int width = kCount / 2; width > 0; width /= 2) {
    if (offset < low) break;
    const bool upper = (lane_idx & offset) != 0;
#pragma unroll
    for (int v = 0; v < width; ++v) {
      const Acc kept = upper ? sum[v + width] : sum[v];
      const Acc given = upper ? sum[v] : sum[v + width];
      sum[v] = kept + __shfl_xor_sync(mask, given, offset);
    }
    if (upper) folded.first += width;
    folded.count = width;
    offset /= 2;
  }
  for (; offset >= low; offset /= 2) {
    sum[0] += __shfl_xor_sync(mask, sum[0], offset);
    if ((lane_idx & offset) != 0) folded.owner = false;
  }
  return folded;
}

// The sum of a lane for kVec columns of one row of Y.
template <typename T, int kVec>
class RowSum {
  using Acc = AccOf<T>;
  using XVector = Vector<T, kVec>;
  static constexpr int kBroadcastUnroll = 8;  // loads of X under way
  static constexpr int kSplitUnroll = sizeof(XVector) == kLoadBytes ? 4 : 8;

 public:
  // A lane whose column lies outside the matrix only takes part in the exchange.
  __device__ __forceinline__ RowSum(const CsrSpmmProblem& problem, int64_t column)
      : col_ind_(problem.w.col_ind),
        values_(static_cast<const T*>(problem.values)),
        x_(reinterpret_cast<uintptr_t>(problem.x) + column * sizeof(T)),
        pitch_(problem.n * sizeof(T)),
        inside_(column < problem.n) {}

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int v = 0; v < kVec; ++v) sum_[v] = Acc(0);
  }

  // Entries [begin, end), the same for the whole warp, each to every lane.
  __device__ __forceinline__ void add_broadcast(int32_t begin, int32_t end) {
    const int32_t lane_idx = threadIdx.x % kWarpSize;
    const int32_t* cols = col_ind_ + begin;
    const T* values = values_ + begin;
    int32_t next_col = 0;
    T next_value = T();
    const auto fetch = [&](int32_t left) {
      if (lane_idx >= left) return;
      next_col = cols[lane_idx];
      next_value = values[lane_idx];
      cols += kWarpSize;
      values += kWarpSize;
    };
    fetch(end - begin);
    for (int32_t left = end - begin; left > 0; left -= kWarpSize) {
      const int32_t col = next_col;
      const Acc value = cuda::to_acc(next_value);
      fetch(left - kWarpSize);
      if (left >= kWarpSize) {
#pragma unroll 1
        for (int step = 0; step < kWarpSize; step += kBroadcastUnroll) hand_around<true>(col, value, step, left);
      } else {
#pragma unroll 1
        for (int step = 0; step < left; step += kBroadcastUnroll) hand_around<false>(col, value, step, left);
      }
    }
  }

  // Every splits-th of the entries [begin, end), from begin + split on.
  __device__ __forceinline__ void add_split(int32_t begin, int32_t end, int32_t split, int32_t splits) {
    if (!inside_) return;
    int32_t left = end - begin - split;
    const int32_t* cols = col_ind_ + begin + split;
    const T* values = values_ + begin + split;
    for (; left > (kSplitUnroll - 1) * splits; left -= kSplitUnroll * splits) {
      add_batch<true>(cols, values, left, splits);
      cols += kSplitUnroll * splits;
      values += kSplitUnroll * splits;
    }
    if (left > 0) add_batch<false>(cols, values, left, splits);
  }

  // Adds up what the splits of a group hold, and hands every finished run of columns to
  // store(first column within the lane, count, sums).
  template <typename Store>
  __device__ __forceinline__ void finish(const LaneMap& map, unsigned mask, Store&& store) {
    const Folded folded = fold(sum_, 1 << map.group_bits() >> 1, map.lanes(), mask);
    if (inside_ && folded.owner) store(folded.first, folded.count, sum_);
  }

 private:
  template <bool kWhole>
  __device__ __forceinline__ void hand_around(int32_t col, Acc value, int32_t step, int32_t left) {
    XVector x[kBroadcastUnroll];
    Acc factor[kBroadcastUnroll];
#pragma unroll
    for (int u = 0; u < kBroadcastUnroll; ++u) {
      factor[u] = __shfl_sync(kFullWarp, value, step + u);
      const int32_t x_row = __shfl_sync(kFullWarp, col, step + u);
      // Where there is no entry zeros stand in for X: an infinity of X must not meet a zero.
      x[u] = inside_ && (kWhole || step + u < left) ? load_x(x_row) : XVector{};
    }
#pragma unroll
    for (int u = 0; u < kBroadcastUnroll; ++u) add(factor[u], x[u]);
  }

  template <bool kWhole>
  __device__ __forceinline__ void add_batch(const int32_t* cols, const T* values, int32_t left, int32_t splits) {
    int32_t x_rows[kSplitUnroll];
    T factor[kSplitUnroll];
    XVector x[kSplitUnroll];
#pragma unroll
    for (int u = 0; u < kSplitUnroll; ++u) {
      const bool entry = kWhole || u * splits < left;
      x_rows[u] = entry ? cols[u * splits] : 0;
      factor[u] = entry ? values[u * splits] : T();
    }
#pragma unroll
    for (int u = 0; u < kSplitUnroll; ++u) {
      x[u] = kWhole || u * splits < left ? load_x(x_rows[u]) : XVector{};
    }
#pragma unroll
    for (int u = 0; u < kSplitUnroll; ++u) add(cuda::to_acc(factor[u]), x[u]);
  }

  // Unsigned and in bytes, the address costs two multiply-adds.
  __device__ __forceinline__ XVector load_x(int32_t x_row) const {
    return *reinterpret_cast<const XVector*>(x_ + static_cast<uint32_t>(x_row) * pitch_);
  }

  __device__ __forceinline__ void add(Acc factor, const XVector& x) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) sum_[v] += factor * cuda::to_acc(x.lane[v]);
  }

  const int32_t* col_ind_;
  const T* values_;
  uintptr_t x_;      // of the lane's first column
  uintptr_t pitch_;  // of X, in bytes
  bool inside_;
  Acc sum_[kVec];
};

template <typename T, int kVec>
__device__ __forceinline__ void store_output(T* y, int32_t first, int32_t count, const AccOf<T> (&sum)[kVec]) {
  if (count == kVec) {
    Vector<T, kVec> out;
#pragma unroll
    for (int v = 0; v < kVec; ++v) out.lane[v] = cuda::from_acc<T>(sum[v]);
    *reinterpret_cast<Vector<T, kVec>*>(y) = out;
    return;
  }
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    if (v < count) y[first + v] = cuda::from_acc<T>(sum[v]);
  }
}

// Grid: x = runs of rows, a group of lanes per row; y = strips of lanes() * kVec columns, folded at
// the grid's limit. Rows run fastest: thread blocks that run together share a strip of X.
template <typename T, int kVec, bool kBroadcast>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kVec, kBroadcast>)
    row_split_kernel(const __grid_constant__ CsrSpmmProblem problem, const __grid_constant__ LaneMap map) {
  const LanePlace place(map);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * map.groups_per_block() + place.group;
  if (row >= problem.w.m) return;
  const int32_t begin = problem.w.row_ptr[row];
  const int32_t end = problem.w.row_ptr[row + 1];
  const int64_t strip_columns = int64_t(map.lanes()) * kVec;
  for (int64_t strip = int64_t(blockIdx.y) * strip_columns; strip < problem.n;
       strip += int64_t(gridDim.y) * strip_columns) {
    const int64_t column = strip + place.lane * kVec;
    RowSum<T, kVec> sum(problem, column);
    sum.clear();
    if (kBroadcast) {
      sum.add_broadcast(begin, end);
    } else {
      sum.add_split(begin, end, place.split, map.splits());
    }
    T* y = static_cast<T*>(problem.y) + row * problem.n + column;
    sum.finish(map, place.mask, [&](int32_t first, int32_t count, const AccOf<T>(&sums)[kVec]) {
      store_output<T, kVec>(y, first, count, sums);
    });
  }
}

// Calls f(integral_constant<int, kVec>) with the number of columns that a lane may move at once, for
// operands whose addresses and row pitches in bytes are or-ed into `addresses`. F returns cudaError_t.
template <typename T, typename F>
cudaError_t dispatch_vector(uintptr_t addresses, F&& f) {
  if (addresses % kLoadBytes == 0) return f(std::integral_constant<int, kLoadBytes / sizeof(T)>{});
  if constexpr (sizeof(T) < kWordBytes) {
    if (addresses % kWordBytes == 0) return f(std::integral_constant<int, kWordBytes / sizeof(T)>{});
  }
  return f(std::integral_constant<int, 1>{});
}

// A lane map for m rows of `vectors` column vectors and nnz / m entries.
inline LaneMap choose_lanes(int64_t vectors, const CsrView& w) {
  constexpr int32_t kLineBits = 3;        // lanes whose widest loads fill a cache line
  constexpr int64_t kWantedWarps = 4096;  // below, the largest devices have idle schedulers
  constexpr int64_t kEntriesPerLane = 2;
  LaneMap map = {kWarpBits, 0};
  const auto strips = [&] { return ceil_div<int64_t>(vectors, map.lanes()); };
  const auto warps = [&] { return (w.m * strips() << map.group_bits()) / kWarpSize; };
  if (vectors <= kWarpSize) {
    // One strip, so that the entries are read once.
    while (map.lane_bits > 0 && map.lanes() / 2 >= vectors) --map.lane_bits;
  } else {
    // At most a quarter of the lanes idle.
    while (3 * strips() * map.lanes() > 4 * vectors) --map.lane_bits;
  }
  while (map.lane_bits > kLineBits && w.m * strips() < kWantedWarps) --map.lane_bits;
  const int64_t row_entries = w.nnz / max_of(w.m, 1);
  while (map.group_bits() < kWarpBits) {
    const int64_t doubled = 2 * map.splits();
    const bool worth = doubled * kEntriesPerLane <= row_entries || (doubled <= row_entries && warps() < kWantedWarps);
    if (!worth) break;
    ++map.split_bits;
  }
  return map;
}

}  // namespace csb::baseline
