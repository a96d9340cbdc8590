#pragma once

#include "cuda/sddmm/region_passes.cuh"

namespace csb::cuda {

// Finds a region's entries: how many each row has, then those of a pass, row by row.
class SddmmRegionEntries {
 public:
  using Config = SddmmRegionConfig;

  __device__ __forceinline__ SddmmRegionEntries(const SddmmProblem& problem, const SddmmRegionLaunch& how,
                                                SddmmRegionShared& shared)
      : problem_(problem), shared_(shared) {
    unsigned region = blockIdx.x, thread = threadIdx.x;
    asm volatile("" : "+r"(region), "+r"(thread));  // opaque, or kept in registers while sums need them, and spilled
    block_row_ = region / how.regions_k * Config::kBlocks;
    block_col_ = region % how.regions_k * Config::kBlocks;
    warp_idx_ = thread / 32;
    lane_idx_ = thread % 32;
  }

  // What loaders and consumers have to know, by all warps of the thread block.
  __device__ __forceinline__ void count() {
    for (int i = threadIdx.x; i < Config::kClasses * (Config::kRegion + 1); i += Config::kThreads) {
      shared_.starts[i / (Config::kRegion + 1)][i % (Config::kRegion + 1)] = 0;
    }
    __syncthreads();
    for_each_entry(Config::kConsumers + Config::kLoaders, 0, Config::kRegion,
                   [&](int32_t, int row, int col) { atomicAdd(&shared_.starts[region_class(col)][row + 1], 1); });
    __syncthreads();
    if (warp_idx_ < Config::kClasses) add_up(shared_.starts[warp_idx_] + 1, shared_.next[warp_idx_]);
    __syncthreads();
    if (threadIdx.x == 0) {
      const int32_t most = max_of(shared_.starts[0][Config::kRegion], shared_.starts[1][Config::kRegion]);
      shared_.quota = SddmmRegionPasses::quota(most);
      shared_.rows = min_of(problem_.w.m - 64 * block_row_, Config::kRegion);
      shared_.cols = min_of(problem_.w.k - 64 * block_col_, Config::kRegion);
    }
    __syncthreads();
  }

  // A pass's entries, by the consumers. A row's come in any order: a sum depends on the columns alone, never on where
  // in the list it stands.
  __device__ __forceinline__ void list(const SddmmRegionPasses& passes) const {
    for_each_entry(Config::kConsumers, passes.first(), passes.last(), [&](int32_t entry, int row, int col) {
      const int of = region_class(col);
      const int32_t at = atomicAdd(&shared_.next[of][row], 1) - shared_.starts[of][passes.first()];
      shared_.places[of][at] = uint32_t(region_offset(row)) << 16 | region_offset(col);
      shared_.entries[of][at] = entry;
    });
  }

  // Calls body(entry) for the padding of every block.
  template <typename Body>
  __device__ __forceinline__ void for_each_padding(Body&& body) const {
    const int row = threadIdx.x / Config::kBlocks, col = threadIdx.x % Config::kBlocks;
    if (row >= Config::kBlocks || block_row_ + row >= problem_.w.mb || block_col_ + col >= problem_.w.kb) return;
    const int32_t block = (block_row_ + row) * problem_.w.kb + block_col_ + col;
    for (int32_t entry = problem_.w.end(block); entry < problem_.w.begin(block + 1); ++entry) body(entry);
  }

 private:
  static constexpr int kRowsPerLane = Config::kRegion / 32;

  // counts[row] becomes the number of entries up to the row's end, first[row] that up to its begin. One warp.
  __device__ __forceinline__ void add_up(int32_t* counts, int32_t* first) const {
    int32_t own[kRowsPerLane], sum = 0;
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) sum += own[i] = counts[lane_idx_ * kRowsPerLane + i];
    int32_t end = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(kFullWarp, end, step);
      if (lane_idx_ >= step) end += other;
    }
    int32_t at = end - sum;
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      first[lane_idx_ * kRowsPerLane + i] = at;
      counts[lane_idx_ * kRowsPerLane + i] = at += own[i];
    }
  }

  // Calls body(entry, row, col), local to the region, for all entries of rows [first, last); `warps` share the blocks.
  template <typename Body>
  __device__ __forceinline__ void for_each_entry(int warps, int first, int last, Body&& body) const {
    const CsbView& w = problem_.w;
#pragma unroll 1
    for (int block = warp_idx_; block < Config::kBlocks * Config::kBlocks; block += warps) {
      const int row = block / Config::kBlocks * 64, col = block % Config::kBlocks * 64;
      const int32_t block_row = block_row_ + row / 64, block_col = block_col_ + col / 64;
      if (block_row >= w.mb || block_col >= w.kb || row >= last || row + 64 <= first) continue;
      const int32_t number = block_row * w.kb + block_col;
      const int32_t end = w.end(number);
#pragma unroll 1
      for (int32_t entry = w.begin(number) + 8 * lane_idx_; entry < end; entry += 8 * 32) {
        const auto codes = *reinterpret_cast<const Vector<uint16_t, 8>*>(w.codes + entry);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int at = row + code_row(codes.lane[i], 6);
          if (entry + i < end && at >= first && at < last) body(entry + i, at, col + code_col(codes.lane[i], 6));
        }
      }
    }
  }

  const SddmmProblem& problem_;
  SddmmRegionShared& shared_;
  int32_t block_row_;
  int32_t block_col_;
  int warp_idx_;
  int lane_idx_;
};

}  // namespace csb::cuda
