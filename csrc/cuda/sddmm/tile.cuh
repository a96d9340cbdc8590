#pragma once

#include "cuda/device/numeric.cuh"
#include "cuda/device/operand_tile.cuh"
#include "cuda/device/warp_tile.cuh"

namespace csb::cuda {

// Two by two blocks of W share their strips of A and B. One warp computes one block.
struct SddmmTileConfig {
  static constexpr int kBlocks = 2;  // along each side
  static constexpr int kWarps = kBlocks * kBlocks;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kColumns = 64;  // of A and B a step; a split starts at a multiple of it
  static constexpr int kStages = 3;
  static constexpr int kThreadBlocks = 2;
  static_assert(kStages >= 3, "with two stages nothing is under way while a step is computed");
  static_assert(kThreads == 2 * kColumns, "one thread computes the offset of one column of A or of B");
};

// What the launcher finds out once for all thread blocks.
struct SddmmTileLaunch {
  int32_t tiles_k;      // tiles along a block row of W
  int32_t tiles;        // in all
  int32_t split_steps;  // steps of kColumns columns a split
  bool a_vectorized;    // operand_vectorized()
  bool b_vectorized;
};

template <typename Scalar, bool kAFeaturesFirst, bool kBFeaturesFirst>
class SddmmTile {
  using Config = SddmmTileConfig;
  static constexpr int kStages = Config::kStages;
  using ATile = OperandTile<kAFeaturesFirst, Config::kColumns, Config::kThreads>;
  using BTile = OperandTile<kBFeaturesFirst, Config::kColumns, Config::kThreads>;
  using Sum = WarpTile<Scalar, 64, 64>;

 public:
  struct alignas(128) Shared {
    struct Stage {
      uint16_t a[Config::kBlocks][ATile::kElements];
      uint16_t b[Config::kBlocks][BTile::kElements];
    };
    union {
      Stage stage[kStages];
      float dense[Config::kWarps][64 * 64];  // after the last step, at the offsets that codes are
    };
    int64_t a_offset[2][Config::kColumns];
    int64_t b_offset[2][Config::kColumns];
    int32_t stored[Config::kWarps];
  };

  __device__ __forceinline__ SddmmTile(const SddmmProblem& problem, const SddmmTileLaunch& launch, Shared& shared)
      : problem_(problem), launch_(launch), shared_(shared) {
    const int32_t tile = static_cast<int32_t>(blockIdx.x % launch.tiles);
    split_ = static_cast<int32_t>(blockIdx.x / launch.tiles);
    block_row_ = tile / launch.tiles_k * Config::kBlocks;
    block_col_ = tile % launch.tiles_k * Config::kBlocks;
    const int64_t steps = ceil_div<int64_t>(problem.a.columns, Config::kColumns);
    first_step_ = static_cast<int64_t>(split_) * launch.split_steps;
    steps_ = static_cast<int32_t>(max(int64_t(0), min(static_cast<int64_t>(launch.split_steps), steps - first_step_)));
  }

  __device__ __forceinline__ void run() {
    // Phase 1: the entries of every warp's block. Strips that no block needs are not loaded.
    const int32_t row = warp_idx() / Config::kBlocks, col = warp_idx() % Config::kBlocks;
    int32_t begin = 0, stored = 0, count = 0;
    if (block_row_ + row < problem_.w.mb && block_col_ + col < problem_.w.kb) {
      const int32_t block = (block_row_ + row) * problem_.w.kb + block_col_ + col;
      begin = problem_.w.begin(block);
      stored = problem_.w.blk_ptr[block + 1] - begin;
      count = stored - problem_.w.blk_pad[block];
    }
    if (lane_idx() == 0) shared_.stored[warp_idx()] = stored;
    list_offsets(0);
    __syncthreads();
    bool any = false;
#pragma unroll
    for (int i = 0; i < Config::kBlocks; ++i) {
      a_used_[i] = shared_.stored[2 * i] > 0 || shared_.stored[2 * i + 1] > 0;
      b_used_[i] = shared_.stored[i] > 0 || shared_.stored[2 + i] > 0;
      any = any || a_used_[i];
    }
    if (!any) return;

    // Phase 2: fill the pipeline. The offsets of a step are listed one barrier ahead of their use.
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      load(step, step);
      list_offsets(step + 1);
      __syncthreads();
    }

    // Phase 3: the dense product of the strips.
    Sum sum;
    sum.clear();
    int32_t stage = 0, previous_stage = kStages - 1;
    for (int32_t step = 0; step < steps_; ++step) {
      copy_async_wait<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1, previous_stage);
      list_offsets(step + kStages);
      if (stored > 0) {
        const auto& operands = shared_.stage[stage];
        sum.template multiply<!kAFeaturesFirst, !kBFeaturesFirst, 64>(operands.a[row], operands.b[col], 0, 0,
                                                                      lane_idx());
      }
      previous_stage = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    __syncthreads();  // the operands make room for the dense result

    // Phase 4: sample it at the codes.
    if (stored > 0) {
      float* dense = shared_.dense[warp_idx()];
      store_dense(sum, dense);
      __syncwarp();
      sample(dense, begin, stored, count);
    }
  }

 private:
  static __device__ __forceinline__ int32_t thread_idx() { return threadIdx.x; }
  static __device__ __forceinline__ int32_t lane_idx() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int32_t warp_idx() { return threadIdx.x / 32; }

  // Columns of a step that exist, 0 behind the last step.
  __device__ __forceinline__ int32_t columns_of(int32_t step) const {
    if (step >= steps_) return 0;
    return static_cast<int32_t>(
        min(int64_t(Config::kColumns), problem_.a.columns - (first_step_ + step) * Config::kColumns));
  }

  // Two lists take turns: while one is read, the next step's is written.
  __device__ __forceinline__ void list_offsets(int32_t step) {
    const int32_t column = thread_idx() % Config::kColumns;
    if (column >= columns_of(step)) return;
    const int64_t j = (first_step_ + step) * Config::kColumns + column;
    if (thread_idx() < Config::kColumns) {
      shared_.a_offset[step % 2][column] = problem_.a.column_offset(j);
    } else {
      shared_.b_offset[step % 2][column] = problem_.b.column_offset(j);
    }
  }

  // Starts the copies of a step, if there is one. Every call makes one group of copies.
  __device__ __forceinline__ void load(int32_t step, int32_t stage) {
    const int32_t columns = columns_of(step);
    if (columns > 0) {
      const Operand a = make_operand(problem_.a, problem_.w.m, launch_.a_vectorized);
      const Operand b = make_operand(problem_.b, problem_.w.k, launch_.b_vectorized);
      auto& operands = shared_.stage[stage];
#pragma unroll
      for (int i = 0; i < Config::kBlocks; ++i) {
        if (a_used_[i]) {
          ATile::load(operands.a[i], a, (block_row_ + i) * 64, shared_.a_offset[step % 2], columns, thread_idx());
        }
        if (b_used_[i]) {
          BTile::load(operands.b[i], b, (block_col_ + i) * 64, shared_.b_offset[step % 2], columns, thread_idx());
        }
      }
    }
    copy_async_commit();
  }

  static __device__ __forceinline__ void store_dense(const Sum& sum, float* dense) {
#pragma unroll
    for (int i = 0; i < Sum::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < Sum::kColTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t offset = tile_offset<64>(16 * i + 8 * half + lane_idx() / 4, 8 * j + 2 * (lane_idx() % 4));
          *reinterpret_cast<float2*>(dense + offset) = {sum.sum[i][j][2 * half], sum.sum[i][j][2 * half + 1]};
        }
      }
    }
  }

  // Alignment 8 makes every vector of eight codes and of eight results an aligned one.
  __device__ __forceinline__ void sample(const float* dense, int32_t begin, int32_t stored, int32_t count) {
    for (int32_t e = 8 * lane_idx(); e < stored; e += 8 * 32) {
      const auto codes = *reinterpret_cast<const Vector<uint16_t, 8>*>(problem_.w.codes + begin + e);
      float sampled[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) sampled[i] = e + i < count ? dense[codes.lane[i]] : 0.0f;
      if (problem_.column_splits > 1) {
        float* out = static_cast<float*>(problem_.partials) + split_ * problem_.entries + begin + e;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          *reinterpret_cast<float4*>(out + i) = {sampled[i], sampled[i + 1], sampled[i + 2], sampled[i + 3]};
        }
      } else {
        Vector<Scalar, 8> out;
#pragma unroll
        for (int i = 0; i < 8; ++i) out.lane[i] = from_acc<Scalar>(sampled[i]);
        *reinterpret_cast<Vector<Scalar, 8>*>(static_cast<Scalar*>(problem_.grad_values) + begin + e) = out;
      }
    }
  }

  const SddmmProblem& problem_;
  const SddmmTileLaunch& launch_;
  Shared& shared_;
  int32_t split_;
  int32_t block_row_;
  int32_t block_col_;
  int64_t first_step_;
  int32_t steps_;
  bool a_used_[Config::kBlocks];
  bool b_used_[Config::kBlocks];
};

// grid.x = tiles of 2 x 2 blocks of W x column splits, tiles fastest and row-major: thread blocks that run
// together read the same columns of A and B at about the same time. Units balance entries; here a block
// costs the same whatever it holds, so the grid follows the blocks and the units are not needed.
template <typename Scalar, bool kAFeaturesFirst, bool kBFeaturesFirst>
__global__ void __launch_bounds__(SddmmTileConfig::kThreads, SddmmTileConfig::kThreadBlocks)
    sddmm_tile(const __grid_constant__ SddmmProblem problem, const __grid_constant__ SddmmTileLaunch launch) {
  using Tile = SddmmTile<Scalar, kAFeaturesFirst, kBFeaturesFirst>;
  extern __shared__ __align__(128) unsigned char shared[];
  Tile(problem, launch, *reinterpret_cast<typename Tile::Shared*>(shared)).run();
}

}  // namespace csb::cuda
