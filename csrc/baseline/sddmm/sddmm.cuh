#pragma once

#include "baseline/merge/merge.cuh"

// Sampled products row by row. Groups of lanes take shares of equally many entries, as in the
// merge-based product: no row is too long, and row_order has nothing to add. Inside a row every lane
// works on kBatch entries at a time, so that many rows of B are under way and a piece of A's row,
// read once, serves them all.
namespace csb::baseline {

constexpr int kSddmmBatch = 8;
constexpr int kSddmmMinBlocks = 4;  // a multiprocessor; the most for which nothing spills

template <typename T, int kVec>
class SddmmGroup {
  using Acc = AccOf<T>;
  using Piece = Vector<T, kVec>;
  static constexpr int kBatch = kSddmmBatch;

 public:
  __device__ __forceinline__ SddmmGroup(const CsrSddmmProblem& problem, const LaneMap& map, const LanePlace& place)
      : problem_(problem), map_(map), place_(place), first_column_(place.lane * kVec) {}

  // The entries [begin, end) of one row.
  __device__ __forceinline__ void run(int32_t row, int32_t begin, int32_t end) const {
    const T* a = static_cast<const T*>(problem_.a) + row * problem_.n;
    const int32_t step = kBatch << map_.split_bits;
    for (int32_t first = begin; first < end;) {
      const int32_t left = end - first;
      if (left >= step) {
        batch<true>(a, first, left);
        first += step;
      } else {
        batch<false>(a, first, left);
        first = end;
      }
    }
  }

 private:
  static __device__ __forceinline__ Piece load(const T* source) { return *reinterpret_cast<const Piece*>(source); }

  // A lane's entries are first + split + i * splits, for i < kBatch.
  template <bool kWhole>
  __device__ __forceinline__ void batch(const T* a, int32_t first, int32_t left) const {
    const int32_t own_left = left - place_.split;
    const auto inside = [&](int32_t i) { return kWhole || i << map_.split_bits < own_left; };

    // Phase 1: the rows of B.
    const int32_t* cols = problem_.w.col_ind + first + place_.split;
    const T* b[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t col = inside(i) ? cols[i << map_.split_bits] : 0;
      b[i] = static_cast<const T*>(problem_.b) + col * problem_.n;
    }

    // Phase 2: this lane's columns of the products.
    Acc sum[kBatch] = {};
    const int32_t step_columns = kVec << map_.lane_bits;
    for (int64_t column = first_column_; column < problem_.n; column += step_columns) {
      const Piece a_piece = load(a + column);
      Piece b_piece[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) b_piece[i] = inside(i) ? load(b[i] + column) : Piece{};
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const Acc factor = cuda::to_acc(a_piece.lane[v]);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) sum[i] += factor * cuda::to_acc(b_piece[i].lane[v]);
      }
    }

    // Phase 3: their sums over the lanes.
    const Folded folded = fold(sum, map_.lanes() / 2, 1, place_.mask);
    if (!folded.owner) return;
    T* grad_values = static_cast<T*>(problem_.grad_values) + first + place_.split;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t entry = folded.first + i;
      if (i < folded.count && inside(entry)) grad_values[entry << map_.split_bits] = cuda::from_acc<T>(sum[i]);
    }
  }

  const CsrSddmmProblem& problem_;
  const LaneMap& map_;
  const LanePlace& place_;
  int64_t first_column_;
};

// Grid: x = runs of shares, a group of lanes per share.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, kSddmmMinBlocks)
    sddmm_kernel(const __grid_constant__ CsrSddmmProblem problem, const __grid_constant__ MergeShares shares,
                 const __grid_constant__ LaneMap map) {
  const LanePlace place(map);
  const int64_t share = static_cast<int64_t>(blockIdx.x) * map.groups_per_block() + place.group;
  if (share >= shares.count) return;
  const int32_t begin = static_cast<int32_t>(share * shares.entries);
  const SddmmGroup<T, kVec> group(problem, map, place);
  RowWalk walk(problem.w, begin, begin + min_of(shares.entries, problem.w.nnz - begin));
  RowRun run;
  while (walk.next(run)) group.run(run.row, run.begin, run.end);
}

}  // namespace csb::baseline
