#pragma once

#include "csb/problem.h"

namespace csb::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

struct WalkedBlock {
  int32_t position;  // in the walk
  int32_t begin;     // its entries, without the padding
  int32_t end;
};

// Walks the blocks that have entries among positions [first, last), row-major (column-major when
// transposed). A pointer load per block would sit in front of every block's entries; a warp reads
// the pointers of 32 blocks at once instead. Every warp of a thread block runs the same walk.
template <bool kTransposed>
class GatherWalk {
 public:
  __device__ __forceinline__ GatherWalk(const CsbView& w, int32_t first, int32_t last)
      : w_(w), last_(last), base_(first) {
    load_batch();
  }

  __device__ __forceinline__ bool next(WalkedBlock& block) {
    while (pending_ == 0) {
      if (last_ - base_ <= kWarpSize) return false;
      base_ += kWarpSize;
      load_batch();
    }
    const int source = __ffs(pending_) - 1;
    pending_ &= pending_ - 1;
    block.position = base_ + source;
    block.begin = __shfl_sync(kFullWarp, begin_, source);
    block.end = __shfl_sync(kFullWarp, end_, source);
    return true;
  }

 private:
  __device__ __forceinline__ void load_batch() {
    const int32_t position = base_ + static_cast<int32_t>(threadIdx.x % kWarpSize);
    begin_ = end_ = 0;
    if (position < last_) {
      const int32_t block = kTransposed ? (position % w_.mb) * w_.kb + position / w_.mb : position;
      begin_ = w_.begin(block);
      end_ = w_.end(block);
    }
    pending_ = __ballot_sync(kFullWarp, begin_ < end_);
  }

  const CsbView& w_;
  int32_t last_;
  int32_t base_;
  int32_t begin_;
  int32_t end_;
  unsigned pending_;
};

}  // namespace csb::cuda
