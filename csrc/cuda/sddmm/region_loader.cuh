#pragma once

#include "cuda/sddmm/region_operand.cuh"

namespace csb::cuda {

// Fills the stages with columns of A and B, a feature's columns side by side. The next tile is on its way while this
// one is stored.
template <VectorAccess kAccess>
class SddmmRegionLoader {
 public:
  using Config = SddmmRegionConfig;
  using Operand = SddmmRegionOperand<kAccess>;
  // Every lane, and copies for themselves.
  static constexpr int kArrivals = 32 * Config::kLoaders * (Operand::kAsync ? 2 : 1);

  __device__ __forceinline__ SddmmRegionLoader(const SddmmProblem& problem, const SddmmRegionLaunch& how,
                                               SddmmRegionShared& shared)
      : shared_(shared),
        a_(problem, problem.a, shared.rows, blockIdx.x / how.regions_k),
        b_(problem, problem.b, shared.cols, blockIdx.x % how.regions_k) {
    const SddmmRegionColumns columns(problem);
    tiles_ = columns.tiles();
    last_width_ = columns.last_width();
  }

  __device__ __forceinline__ void run() {
    SddmmRegionPasses passes(shared_);
    while (passes.next_own()) {
      const uint32_t rows = SddmmRegionItems::of(passes.first(), min_of(passes.last(), shared_.rows));
      const uint32_t cols = SddmmRegionItems::of(0, shared_.cols);
#pragma unroll 1
      for (int32_t next = 0; next <= tiles_; ++next) {
        const int32_t tile = next - 1;
        SddmmRegionStage& stage = shared_.stages[position_.slot];
        if (tile >= 0) {
          mbarrier_wait(shared_address(&shared_.empty[position_.slot]), position_.parity ^ 1);
          a_.put(stage.a, tile, width_of(tile), rows);
        }
        if (next < tiles_) a_.fetch(next, width_of(next), rows);
        if (tile >= 0) b_.put(stage.b, tile, width_of(tile), cols);
        if (next < tiles_) b_.fetch(next, width_of(next), cols);
        if (tile < 0) continue;
        const uint32_t full = shared_address(&shared_.full[position_.slot]);
        if (Operand::kAsync) mbarrier_arrive_after_copies(full);
        __syncwarp();
        mbarrier_arrive(full);
        position_.advance(1);
      }
    }
  }

 private:
  __device__ __forceinline__ int32_t width_of(int32_t tile) const {
    return tile + 1 < tiles_ ? Config::kTileN : last_width_;
  }

  SddmmRegionShared& shared_;
  int32_t tiles_;
  int32_t last_width_;
  Operand a_;
  Operand b_;
  RingPosition<Config::kStages> position_{0};
};

}  // namespace csb::cuda
