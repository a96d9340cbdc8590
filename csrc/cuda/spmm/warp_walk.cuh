#pragma once

#include "cuda/device/cluster.cuh"
#include "cuda/device/epilogue.cuh"

// For kernels whose warps work alone: which blocks of 64 a warp takes, and what becomes of the warps' sums.

namespace csb::cuda {

struct WarpLaunch {
  bool split_strips;  // a thread block walks a unit, else a strip with the others of its cluster
  int32_t cluster;    // thread blocks that share a strip, 1 when split_strips
};

// What a thread block works on, kept in shared memory because registers are short.
struct WarpRun {
  int32_t item;   // unit or strip
  int32_t strip;  // first one
  int32_t rank;   // within the cluster
  int32_t first;  // block positions
  int32_t last;
};

// False where there is nothing to do. Every thread calls it.
__device__ __forceinline__ bool enter_run(const SpmmProblem& problem, const WarpLaunch& launch, WarpRun& run) {
  const int32_t item = static_cast<int32_t>(blockIdx.x) / launch.cluster;
  const int32_t blocks = problem.blocks_per_strip();
  int32_t first = item * blocks, last = first + blocks, strip = item;
  if (launch.split_strips) {
    first = problem.units[item];
    last = problem.units[item + 1];
    if (first >= last) return false;
    strip = first / blocks;
  }
  if (threadIdx.x == 0) run = {item, strip, static_cast<int32_t>(blockIdx.x) % launch.cluster, first, last};
  __syncthreads();
  return true;
}

// Where the blocks of a strip begin and end that a warp takes, every stride-th from `first` on and below `last`: 32 at
// a time, one a lane. A bit of `pending_` stands for each that has entries and is still to come.
template <bool kTransposed>
class BlockPointers {
 protected:
  static constexpr unsigned kFullWarp = 0xffffffffu;

  __device__ __forceinline__ BlockPointers(const SpmmProblem& problem, int32_t strip, int32_t first, int32_t last,
                                           int32_t stride)
      : problem_(problem), strip_(strip), stride_(stride), at_(first), last_(last) {}

  // False where no block is left.
  __device__ __forceinline__ bool find_pending() {
    while (pending_ == 0) {
      if (at_ >= last_) return false;
      base_ = at_;
      read();
      pending_ = __ballot_sync(kFullWarp, begin_ < end_);
      at_ += 32 * stride_;
    }
    return true;
  }

  // The lane that holds the next one.
  __device__ __forceinline__ int source() const { return __ffs(static_cast<int>(pending_)) - 1; }
  __device__ __forceinline__ void remove() { pending_ &= pending_ - 1; }
  __device__ __forceinline__ int32_t begin_of(int source) const { return __shfl_sync(kFullWarp, begin_, source); }
  __device__ __forceinline__ int32_t end_of(int source) const { return __shfl_sync(kFullWarp, end_, source); }
  __device__ __forceinline__ int32_t block_of(int source) const { return base_ + stride_ * source; }

 private:
  __device__ __forceinline__ void read() {
    const int32_t in_block = at_ + stride_ * static_cast<int32_t>(threadIdx.x % 32);
    begin_ = end_ = 0;
    if (in_block < last_) {
      const int32_t block = kTransposed ? in_block * problem_.w.kb + strip_ : strip_ * problem_.w.kb + in_block;
      begin_ = problem_.w.blk_ptr[block];
      end_ = problem_.w.blk_ptr[block + 1] - problem_.w.blk_pad[block];
    }
  }

  const SpmmProblem& problem_;
  int32_t strip_;
  int32_t stride_;  // from a block of this warp to its next
  int32_t at_;      // within the strip, of lane 0's next pointer
  int32_t last_;
  int32_t base_ = 0;  // within the strip, of lane 0's current pointer
  int32_t begin_ = 0, end_ = 0;
  unsigned pending_ = 0;
};

struct WalkedBlock {
  int32_t begin;
  int32_t count;
  int32_t block;  // within its strip
};

// Whole blocks.
template <bool kTransposed>
class BlockWalk : BlockPointers<kTransposed> {
  using Base = BlockPointers<kTransposed>;

 public:
  __device__ __forceinline__ BlockWalk(const SpmmProblem& problem, int32_t strip, int32_t first, int32_t last,
                                       int32_t stride)
      : Base(problem, strip, first, last, stride) {}

  __device__ __forceinline__ bool next(WalkedBlock& block) {
    if (!Base::find_pending()) return false;
    const int source = Base::source();
    Base::remove();
    block.begin = Base::begin_of(source);
    block.count = Base::end_of(source) - block.begin;
    block.block = Base::block_of(source);
    return true;
  }
};

// A part of a block: at most as many entries as a warp takes at a time.
struct BlockStep {
  int32_t begin;
  int32_t count;
  int32_t block;  // within its strip
  bool first;     // of its block
  bool last;
};

// Every kWarps-th block of a run, kStep entries at a time.
template <bool kTransposed, int kWarps, int kStep>
class WarpWalk : BlockPointers<kTransposed> {
  using Base = BlockPointers<kTransposed>;

 public:
  __device__ __forceinline__ WarpWalk(const SpmmProblem& problem, int32_t strip, int32_t first, int32_t last,
                                      int32_t rank, int32_t cluster)
      : Base(problem, strip, first + rank * kWarps + static_cast<int32_t>(threadIdx.x) / 32, last, kWarps * cluster) {}

  __device__ __forceinline__ bool next(BlockStep& step) {
    if (!Base::find_pending()) return false;
    const int source = Base::source();
    step.begin = Base::begin_of(source) + offset_;
    const int32_t rest = Base::end_of(source) - step.begin;
    step.block = Base::block_of(source);
    step.first = offset_ == 0;
    step.last = rest <= kStep;
    step.count = min_of(rest, kStep);
    offset_ += kStep;
    if (step.last) {
      Base::remove();
      offset_ = 0;
    }
    return true;
  }

 private:
  int32_t offset_ = 0;
};

template <typename T, bool kOneRun>
__device__ __forceinline__ void write_output(const SpmmProblem& problem, int32_t feature, int32_t column, float total) {
  if (feature >= problem.out_features()) return;
  const Epilogue<T> epilogue = epilogue_of<T>(problem);
  const int64_t offset = kOneRun ? column * problem.y.stride[2] : problem.y.column_offset(column);
  static_cast<T*>(problem.y.data)[feature * problem.y.stride_f + offset] =
      epilogue.finish(total, epilogue.bias_of(feature));
}

// Adds up the kParts sums of a strip, sums[kPitch * part + 64 * column + row], and writes them to Y, or to the partial
// sums where the strip is shared with other units. `columns` of them, from first_column on; kOneRun: all of Y's columns
// stand equally far apart.
template <typename T, bool kOneRun, int kParts, int kPitch>
__device__ __forceinline__ void hand_over(const SpmmProblem& problem, const WarpLaunch& launch, const WarpRun& run,
                                          int32_t strip, int32_t first_column, int32_t columns, float* sums) {
  const int32_t blocks = problem.blocks_per_strip();
  const bool whole = run.first <= strip * blocks && strip * blocks + blocks <= run.last;
  const int32_t items = 64 * columns, threads = static_cast<int32_t>(blockDim.x);
#pragma unroll 2
  for (int32_t item = threadIdx.x; item < items; item += threads) {
    const int32_t row = item % 64, column = first_column + item / 64;
    float total = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) total += sums[kPitch * part + item];
    if (launch.cluster > 1) {
      sums[item] = total;
    } else if (whole) {
      write_output<T, kOneRun>(problem, strip * 64 + row, column, total);
    } else {
      const int64_t at = (int64_t{run.item} + strip) * 64 + row;
      static_cast<float*>(problem.partials)[at * problem.y.columns + column] = total;
    }
  }
  if (launch.cluster > 1) {
    cluster_sync();
    for (int32_t item = threads * run.rank + threadIdx.x; item < items; item += threads * launch.cluster) {
      float total = 0;
      for (int32_t rank = 0; rank < launch.cluster; ++rank) total += read_neighbour(&sums[item], rank);
      write_output<T, kOneRun>(problem, strip * 64 + item % 64, first_column + item / 64, total);
    }
    cluster_sync();
  }
}

}  // namespace csb::cuda
