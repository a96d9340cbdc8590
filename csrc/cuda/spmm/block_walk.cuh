#pragma once

#include "csb/problem.h"

namespace csb::cuda {

// One step of a walk: entries [begin, begin + count) of a block.
struct WalkStep {
  int32_t begin;
  int32_t count;
  int32_t block;  // index within its strip, that is 64-feature group of the input
  int32_t strip;
};

// Walks the blocks at positions [first, last), the empty ones left out, in steps of at most kChunk
// entries. The pointers of kBatch blocks are read at once and a batch ahead: a pointer read in every
// step would cost its full latency in every step.
//
//   steps        ... | taken | being computed ... being fetched | batch to come
//   cursors                    compute           fetch            list_end_
//
// Every thread of the block holds the same cursors; take() must be called by all of them.
template <int kThreads, int kChunk, int kLookahead>
class BlockWalk {
 public:
  static constexpr int kBatch = 128;
  static_assert(kThreads >= kBatch && kThreads % 32 == 0, "one thread reads the pointers of one block");
  static_assert(kLookahead < kBatch, "the steps under way must survive the next batch");

  struct Shared {
    WalkStep steps[2 * kBatch];  // ring
    int32_t warp_count[kBatch / 32];
  };

  __device__ __forceinline__ BlockWalk(const SpmmProblem& problem, Shared& shared, int32_t first, int32_t last)
      : problem_(problem), shared_(shared), next_(first), last_(last) {
    read_pointers();
  }

  // The next step to fetch; false when the walk is over. May synchronise the thread block.
  __device__ __forceinline__ bool fetch(WalkStep& step) {
    while (fetch_.index == list_end_) {
      if (next_ >= last_) return false;
      append_batch();
    }
    step = take(fetch_);
    return true;
  }

  // The steps again, in the same order, at most kLookahead of them behind fetch().
  __device__ __forceinline__ bool done() const { return compute_.index == list_end_; }
  __device__ __forceinline__ int32_t strip() const { return at(compute_.index).strip; }
  __device__ __forceinline__ WalkStep compute() { return take(compute_); }

 private:
  struct Cursor {
    int32_t index = 0;
    int32_t offset = 0;  // entries of this block already taken
  };

  __device__ __forceinline__ WalkStep& at(int32_t index) const { return shared_.steps[index & (2 * kBatch - 1)]; }

  __device__ __forceinline__ WalkStep take(Cursor& cursor) const {
    WalkStep step = at(cursor.index);
    step.begin += cursor.offset;
    step.count -= cursor.offset;
    if (step.count > kChunk) {
      step.count = kChunk;
      cursor.offset += kChunk;
    } else {
      cursor = {cursor.index + 1, 0};
    }
    return step;
  }

  __device__ __forceinline__ void read_pointers() {
    const int32_t thread_idx = threadIdx.x;
    begin_ = end_ = padding_ = 0;
    if (thread_idx < kBatch && thread_idx < last_ - next_) {
      const int32_t block = problem_.block_at(next_ + thread_idx);
      begin_ = problem_.w.blk_ptr[block];
      end_ = problem_.w.blk_ptr[block + 1];
      padding_ = problem_.w.blk_pad[block];
    }
  }

  __device__ __forceinline__ void append_batch() {
    const int32_t thread_idx = threadIdx.x;
    const int32_t count = end_ - padding_ - begin_;
    const uint32_t filled = __ballot_sync(0xffffffffu, count > 0);
    if (thread_idx < kBatch && thread_idx % 32 == 0) shared_.warp_count[thread_idx / 32] = __popc(filled);
    __syncthreads();
    int32_t index = list_end_ + __popc(filled & ((1u << (thread_idx % 32)) - 1));
#pragma unroll
    for (int warp = 0; warp < kBatch / 32; ++warp) {
      if (warp < thread_idx / 32) index += shared_.warp_count[warp];
      list_end_ += shared_.warp_count[warp];
    }
    if (count > 0) {
      const int32_t position = next_ + thread_idx;
      const int32_t strip = position / problem_.blocks_per_strip();
      at(index) = {begin_, count, position - strip * problem_.blocks_per_strip(), strip};
    }
    next_ += min(kBatch, last_ - next_);
    read_pointers();
    __syncthreads();  // the list is complete, and warp_count is free for the next batch
  }

  const SpmmProblem& problem_;
  Shared& shared_;
  int32_t next_;  // first position of the batch whose pointers are in registers
  int32_t last_;
  int32_t list_end_ = 0;
  Cursor fetch_;
  Cursor compute_;
  int32_t begin_, end_, padding_;
};

}  // namespace csb::cuda
