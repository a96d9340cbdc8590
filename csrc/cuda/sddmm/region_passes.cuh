#pragma once

#include "cuda/device/gather_walk.cuh"
#include "cuda/sddmm/region_config.cuh"

namespace csb::cuda {

// The passes of a region over the columns: runs of rows whose entries find room in the consumers' registers, even in
// size. The region's thread blocks take turns; loaders and consumers make the same ones.
class SddmmRegionPasses {
 public:
  using Config = SddmmRegionConfig;

  __device__ __forceinline__ explicit SddmmRegionPasses(const SddmmRegionShared& shared) : shared_(shared) {}

  static __device__ __forceinline__ int32_t quota(int32_t most) {
    const int32_t passes = max_of(1, ceil_div(most, Config::kCapacity));
    return min_of(Config::kCapacity, ceil_div(most, passes) + Config::kRegion / 2);
  }

  // Moves on to this thread block's next rows; false where there are none left.
  __device__ __forceinline__ bool next_own() {
    unsigned skip = last_ == 0 ? blockIdx.z : gridDim.z - 1;
    do {
      if (!next()) return false;
    } while (skip-- > 0);
    return true;
  }

  __device__ __forceinline__ int32_t first() const { return first_; }
  __device__ __forceinline__ int32_t last() const { return last_; }
  __device__ __forceinline__ int32_t count(int region_class) const { return count_to(region_class, last_); }

 private:
  __device__ __forceinline__ bool next() {
    first_ = last_;
    if (first_ == Config::kRegion) return false;
    int32_t beyond = Config::kRegion + 1;
    last_ = first_ + 1;
    while (beyond - last_ > 1) {
      const int32_t middle = (last_ + beyond) / 2;
      const bool fits = count_to(0, middle) <= shared_.quota && count_to(1, middle) <= shared_.quota;
      (fits ? last_ : beyond) = middle;
    }
    return true;
  }

  __device__ __forceinline__ int32_t count_to(int region_class, int32_t row) const {
    return shared_.starts[region_class][row] - shared_.starts[region_class][first_];
  }

  const SddmmRegionShared& shared_;
  int32_t first_ = 0;
  int32_t last_ = 0;
};

// Columns [begin, end) of A and B are a thread block's.
struct SddmmRegionColumns {
  int64_t begin;
  int64_t end;

  __device__ __forceinline__ explicit SddmmRegionColumns(const SddmmProblem& problem) {
    using Config = SddmmRegionConfig;
    unsigned split = blockIdx.y;
    asm volatile("" : "+r"(split));  // opaque, or the columns are kept in registers from one use to the next, and spill
    const int64_t columns = problem.a.columns;
    const int64_t tiles = ceil_div<int64_t>(columns, Config::kTileN);
    const int64_t run = ceil_div<int64_t>(tiles, problem.column_splits) * Config::kTileN;
    begin = min_of<int64_t>(split * run, columns);
    end = min_of<int64_t>(begin + run, columns);
  }

  __device__ __forceinline__ int32_t tiles() const {
    return static_cast<int32_t>(ceil_div<int64_t>(end - begin, SddmmRegionConfig::kTileN));
  }

  // Of the last tile; every other one has all of them.
  __device__ __forceinline__ int32_t last_width() const {
    return static_cast<int32_t>(end - begin - int64_t(tiles() - 1) * SddmmRegionConfig::kTileN);
  }
};

}  // namespace csb::cuda
