#pragma once

#include "cuda/device/gather_walk.cuh"
#include "cuda/spmm/rows_config.cuh"

namespace csb::cuda {

struct RowsStep {
  RowsStepKind kind;
  int32_t at;      // of the block in its strip
  int32_t window;  // first place, by output feature, of the entries that this step takes
  int32_t strip;   // first one of the group
  int64_t first_column;
};

// The steps of a thread block: column tile by column tile, strip by strip, a step for every block that has entries (or
// for kStrips of them side by side, where one has) and one at the end of a strip. Every loader and every sorter makes
// the same walk; the pointers of 32 blocks are read at once.
template <typename Config, bool kTransposed>
class RowsWalk {
 public:
  static constexpr int kStrips = Config::kStrips;

  // strip: of the group, whose entries the caller wants.
  __device__ __forceinline__ RowsWalk(const SpmmProblem& problem, const RowsLaunch& how, int strip)
      : problem_(problem), how_(how), wanted_(strip) {
    const int32_t per_strip = blocks_per_strip();
    const int32_t strips = kTransposed ? problem.w.kb : problem.w.mb;
    lane_idx_ = threadIdx.x % 32;
    tile_ = blockIdx.y;
    if constexpr (Config::kCluster) {
      const int32_t rank = blockIdx.x % how.cluster;
      first_strip_ = blockIdx.x / how.cluster;
      first_ = first_strip_ * per_strip + static_cast<int32_t>(int64_t{rank} * per_strip / how.cluster);
      last_ = first_strip_ * per_strip + static_cast<int32_t>((int64_t{rank} + 1) * per_strip / how.cluster);
    } else if (kStrips == 1 && how.split) {
      first_ = problem.units[blockIdx.x];
      last_ = problem.units[blockIdx.x + 1];
      first_strip_ = first_ / per_strip;
      if (first_ == last_) tile_ = how.tiles;
    } else {
      first_strip_ = blockIdx.x * kStrips;
      first_ = first_strip_ * per_strip;
      last_ = min_of(first_strip_ + kStrips, strips) * per_strip;
    }
    strip_ = first_strip_;
    if (tile_ < how.tiles) enter_strip();
  }

  __device__ __forceinline__ RowsStep next() {
    RowsStep step = {RowsStepKind::kEnd, 0, 0, strip_, int64_t(tile_) * Config::kTileN};
    if (tile_ >= how_.tiles) return step;
    while (window_ >= largest_here_) {
      if (pending_ == 0) {
        if (base_ + 32 >= strip_last_) {
          step.kind = RowsStepKind::kFlush;
          leave_strip();
          return step;
        }
        base_ += 32;
        read_pointers();
        continue;
      }
      source_ = __ffs(pending_) - 1;
      pending_ &= pending_ - 1;
      window_ = 0;
      largest_here_ = __shfl_sync(kFullWarp, largest_, source_);
    }
    step.kind = RowsStepKind::kMultiply;
    step.at = base_ + source_;
    step.window = window_;
    window_ += Config::kCapacity;
    return step;
  }

  // Of the wanted strip, in the step that next() gave last.
  __device__ __forceinline__ int32_t begin() const { return __shfl_sync(kFullWarp, begin_, source_); }
  __device__ __forceinline__ int32_t count() const { return __shfl_sync(kFullWarp, count_, source_); }

 private:
  __device__ __forceinline__ int32_t blocks_per_strip() const { return kTransposed ? problem_.w.mb : problem_.w.kb; }

  __device__ __forceinline__ void enter_strip() {
    const int32_t strip_begin = strip_ * blocks_per_strip();
    base_ = max_of(0, first_ - strip_begin);
    strip_last_ = min_of(blocks_per_strip(), last_ - strip_begin);
    window_ = largest_here_ = 0;
    read_pointers();
  }

  __device__ __forceinline__ void leave_strip() {
    ++strip_;
    if (kStrips > 1 || strip_ * blocks_per_strip() >= last_) {
      strip_ = first_strip_;
      tile_ += gridDim.y;
      if (tile_ >= how_.tiles) return;
    }
    enter_strip();
  }

  __device__ __forceinline__ void read_pointers() {
    const CsbView& w = problem_.w;
    const int32_t strips = kTransposed ? w.kb : w.mb;
    int32_t lane_idx = lane_idx_;
    asm volatile("" : "+r"(lane_idx));  // opaque, or addresses made of it are kept in registers, and spill
    const int32_t at = base_ + lane_idx;
    begin_ = count_ = largest_ = 0;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      if (at >= strip_last_ || strip_ + s >= strips) continue;
      const int32_t block = kTransposed ? at * w.kb + strip_ + s : (strip_ + s) * w.kb + at;
      const int32_t begin = w.begin(block);
      const int32_t count = w.end(block) - begin;
      largest_ = max_of(largest_, count);
      if (s == wanted_) {
        begin_ = begin;
        count_ = count;
      }
    }
    pending_ = __ballot_sync(kFullWarp, largest_ > 0);
  }

  const SpmmProblem& problem_;
  const RowsLaunch& how_;
  const int wanted_;
  int lane_idx_;
  int32_t tile_;
  int32_t first_;  // positions of this thread block
  int32_t last_;
  int32_t first_strip_;
  int32_t strip_;
  int32_t strip_last_;
  int32_t base_;
  int32_t begin_;  // of this lane's block
  int32_t count_;
  int32_t largest_;  // count among the strips
  unsigned pending_;
  int source_ = 0;
  int32_t largest_here_;
  int32_t window_;
};

}  // namespace csb::cuda
