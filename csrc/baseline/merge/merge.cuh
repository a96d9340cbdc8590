#pragma once

#include "baseline/row_split/row_split.cuh"

// The merge-based product of Yang, Buluc, Owens (Euro-Par 2018), after the merge path of Merrill and
// Garland ("Merge-Based Parallel Sparse Matrix-Vector Multiplication", SC 2016). Every group of lanes
// takes a share of equally many entries, whatever the rows are. Shares and rows:
//
//   entries   |     share 0     |     share 1     |     share 2     |
//   rows      | r0 | r1 |    r2       ...    r2        |  r3 |  r4  |
//   sums go to  Y    Y    last 0     first 1    first 2    Y     Y
//
// A row inside one share goes to Y. Of the others every share leaves its part in scratch, and the
// fix-up adds the parts up in the order of the shares.
namespace csb::baseline {

struct MergeShares {
  int32_t entries;  // of a share; the last one may have fewer
  int32_t count;
};

// The sums [n] of the row that reaches a share from the one before, and of the row that leaves it.
template <typename Acc>
struct MergeScratch {
  Acc* data;  // [shares, 2, n]
  int64_t n;

  __device__ __forceinline__ Acc* first(int64_t share) const { return data + 2 * share * n; }
  __device__ __forceinline__ Acc* last(int64_t share) const { return data + (2 * share + 1) * n; }
};

// The row among [low, high] that holds an entry.
__device__ __forceinline__ int32_t row_between(const CsrView& w, int32_t low, int32_t high, int32_t entry) {
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (w.row_ptr[middle + 1] <= entry) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ int32_t row_of(const CsrView& w, int32_t entry) { return row_between(w, 0, w.m - 1, entry); }

// The same where it is known to be `row` or a later one. Doubling steps find it fast where it is near,
// and still in a logarithm of the gap behind a long run of empty rows.
__device__ __forceinline__ int32_t row_from(const CsrView& w, int32_t row, int32_t entry) {
  int32_t low = row;
  int32_t high = row;
  for (int32_t step = 1; high < w.m && w.row_ptr[high + 1] <= entry; step = min_of(step, 1 << 29) * 2) {
    low = high + 1;
    high = w.m - high > step ? high + step : w.m;
  }
  return row_between(w, low, min_of(high, w.m - 1), entry);
}

// The entries of one row inside a share.
struct RowRun {
  int32_t row;
  int32_t begin;
  int32_t end;
  bool starts;  // the row's first entry is here
  bool ends;    // so is its last
};

// Walks the rows of the entries [begin, end).
class RowWalk {
 public:
  __device__ __forceinline__ RowWalk(const CsrView& w, int32_t begin, int32_t end)
      : w_(w), entry_(begin), end_(end), row_(0), row_end_(0) {
    if (begin >= end) return;
    row_ = row_of(w, begin);
    row_end_ = w.row_ptr[row_ + 1];
    starts_ = w.row_ptr[row_] == begin;
  }

  __device__ __forceinline__ bool next(RowRun& run) {
    if (entry_ >= end_) return false;
    if (row_end_ <= entry_) {
      row_ = row_from(w_, row_, entry_);
      row_end_ = w_.row_ptr[row_ + 1];
    }
    run = {row_, entry_, min_of(row_end_, end_), starts_, row_end_ <= end_};
    entry_ = run.end;
    starts_ = true;
    // Read now, the next pointer is there when this row has been computed.
    if (entry_ < end_) row_end_ = w_.row_ptr[++row_ + 1];
    return true;
  }

 private:
  const CsrView& w_;
  int32_t entry_;
  int32_t end_;
  int32_t row_;
  int32_t row_end_;
  bool starts_;
};

template <int kVec, typename Acc>
__device__ __forceinline__ void store_part(Acc* part, int32_t first, int32_t count, const Acc (&sum)[kVec]) {
  constexpr int kPiece = min_of<int>(kVec, kLoadBytes / sizeof(Acc));
  if (count == kVec) {
#pragma unroll
    for (int v = 0; v < kVec; v += kPiece) {
      Vector<Acc, kPiece> piece;
#pragma unroll
      for (int p = 0; p < kPiece; ++p) piece.lane[p] = sum[v + p];
      *reinterpret_cast<Vector<Acc, kPiece>*>(part + v) = piece;
    }
    return;
  }
#pragma unroll
  for (int v = 0; v < kVec; ++v) {
    if (v < count) part[first + v] = sum[v];
  }
}

// Grid: x = runs of shares, a group of lanes per share; y = strips of lanes() * kVec columns, folded
// at the grid's limit.
template <typename T, int kVec, bool kBroadcast>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, kVec, kBroadcast>)
    merge_kernel(const __grid_constant__ CsrSpmmProblem problem, const __grid_constant__ MergeShares shares,
                 const __grid_constant__ LaneMap map) {
  using Acc = AccOf<T>;
  const LanePlace place(map);
  const int64_t share = static_cast<int64_t>(blockIdx.x) * map.groups_per_block() + place.group;
  if (share >= shares.count) return;
  const int32_t begin = static_cast<int32_t>(share * shares.entries);
  const int32_t end = begin + min_of(shares.entries, problem.w.nnz - begin);
  const MergeScratch<Acc> scratch = {static_cast<Acc*>(problem.scratch), problem.n};
  const int64_t strip_columns = int64_t(map.lanes()) * kVec;
  for (int64_t strip = int64_t(blockIdx.y) * strip_columns; strip < problem.n;
       strip += int64_t(gridDim.y) * strip_columns) {
    const int64_t column = strip + place.lane * kVec;
    RowSum<T, kVec> sum(problem, column);
    RowWalk walk(problem.w, begin, end);
    RowRun run;
    while (walk.next(run)) {
      sum.clear();
      if (kBroadcast) {
        sum.add_broadcast(run.begin, run.end);
      } else {
        sum.add_split(run.begin, run.end, place.split, map.splits());
      }
      sum.finish(map, place.mask, [&](int32_t first, int32_t count, const Acc(&sums)[kVec]) {
        if (run.starts && run.ends) {
          store_output<T, kVec>(static_cast<T*>(problem.y) + run.row * problem.n + column, first, count, sums);
        } else {
          store_part<kVec>((run.starts ? scratch.last(share) : scratch.first(share)) + column, first, count, sums);
        }
      });
    }
  }
}

constexpr int kFixUpColumns = 128;  // of a tile

// Grid: x = runs of items, a warp each: first the borders between shares, then the runs of 32 rows;
//       y = tiles of kFixUpColumns columns, folded at the grid's limit.
//
// A border finishes the row that crosses it, unless an earlier border does; a run of rows writes the
// empty ones, which no share visits. The lanes of a warp are columns, and splits where those are few.
template <typename T>
class MergeFixUp {
  using Acc = AccOf<T>;
  static constexpr int kUnroll = 8;

 public:
  __device__ __forceinline__ MergeFixUp(const CsrSpmmProblem& problem, const MergeShares& shares, const LaneMap& map)
      : problem_(problem), shares_(shares), map_(map), y_(static_cast<T*>(problem.y)) {}

  __device__ __forceinline__ void run() const {
    const int64_t item = int64_t(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    const int64_t borders = max_of(shares_.count - 1, 0);
    if (item < borders) {
      finish_crossing_row(static_cast<int32_t>(item) + 1);
    } else {
      clear_empty_rows((item - borders) * kWarpSize);
    }
  }

 private:
  // The row across the border in front of a share.
  __device__ __forceinline__ void finish_crossing_row(int32_t share) const {
    const int32_t border = share * shares_.entries;
    const int32_t row = row_of(problem_.w, border);
    const int32_t begin = problem_.w.row_ptr[row];
    if (begin == border || begin < border - shares_.entries) return;
    const int32_t last_share = (problem_.w.row_ptr[row + 1] - 1) / shares_.entries;
    const MergeScratch<Acc> scratch = {static_cast<Acc*>(problem_.scratch), problem_.n};
    const LanePlace place(map_);
    each_column_run(map_.lanes(), [&](int64_t first_column) {
      const int64_t column = first_column + place.lane;
      const bool inside = column < problem_.n;
      Acc sum[1] = {Acc(0)};
      if (inside) {
        if (place.split == 0) sum[0] = scratch.last(share - 1)[column];
#pragma unroll kUnroll
        for (int32_t s = share + place.split; s <= last_share; s += map_.splits()) sum[0] += scratch.first(s)[column];
      }
      fold(sum, kWarpSize / 2, map_.lanes(), kFullWarp);
      if (inside && place.split == 0) y_[row * problem_.n + column] = cuda::from_acc<T>(sum[0]);
    });
  }

  __device__ __forceinline__ void clear_empty_rows(int64_t first_row) const {
    const int32_t lane_idx = threadIdx.x % kWarpSize;
    const int64_t own_row = first_row + lane_idx;
    const bool empty = own_row < problem_.w.m && problem_.w.row_ptr[own_row] == problem_.w.row_ptr[own_row + 1];
    for (unsigned rows = __ballot_sync(kFullWarp, empty); rows != 0; rows &= rows - 1) {
      T* y = y_ + (first_row + __ffs(rows) - 1) * problem_.n;
      each_column_run(kWarpSize, [&](int64_t first_column) {
        if (first_column + lane_idx < problem_.n) y[first_column + lane_idx] = cuda::from_acc<T>(Acc(0));
      });
    }
  }

  // Calls f(first column) for the runs of `columns` columns in this thread block's tiles.
  template <typename F>
  __device__ __forceinline__ void each_column_run(int32_t columns, F&& f) const {
    for (int64_t tile = blockIdx.y; tile * kFixUpColumns < problem_.n; tile += gridDim.y) {
      const int64_t end = min_of<int64_t>((tile + 1) * kFixUpColumns, problem_.n);
      for (int64_t column = tile * kFixUpColumns; column < end; column += columns) f(column);
    }
  }

  const CsrSpmmProblem& problem_;
  const MergeShares& shares_;
  const LaneMap& map_;
  T* y_;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    merge_fix_up_kernel(const __grid_constant__ CsrSpmmProblem problem, const __grid_constant__ MergeShares shares,
                        const __grid_constant__ LaneMap map) {
  MergeFixUp<T>(problem, shares, map).run();
}

}  // namespace csb::baseline
