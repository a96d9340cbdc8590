#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/device/operand_tile.cuh"
#include "cuda/device/warp_tile.cuh"
#include "cuda/spmm/block_walk.cuh"

namespace csb::cuda {

// The numbers of the kernel for each width of the output tile.
template <int kTileN>
struct TileConfig;

template <>
struct TileConfig<8> {
  static constexpr int kWarpsM = 4, kWarpsN = 1, kStages = 4, kChunk = 1024, kThreadBlocks = 4;
};
template <>
struct TileConfig<32> {
  static constexpr int kWarpsM = 2, kWarpsN = 2, kStages = 4, kChunk = 1024, kThreadBlocks = 3;
};
template <>
struct TileConfig<64> {
  static constexpr int kWarpsM = 2, kWarpsN = 2, kStages = 3, kChunk = 1024, kThreadBlocks = 3;
};
template <>
struct TileConfig<128> {
  static constexpr int kWarpsM = 2, kWarpsN = 2, kStages = 3, kChunk = 1536, kThreadBlocks = 2;
};

// What the launcher finds out once for all thread blocks.
struct TileLaunch {
  int32_t items;           // units or strips
  bool split_strips;       // an item is a unit, else a strip
  bool x_vectorized;       // operand_vectorized()
  bool values_vectorized;  // values are 8-byte aligned
};

template <typename Scalar, bool kTransposed, bool kFeaturesFirst, int kTileN>
class SpmmTile {
  using Config = TileConfig<kTileN>;
  static constexpr int kStages = Config::kStages;
  static constexpr int kChunk = Config::kChunk;
  static constexpr int kWeightTiles = 3;
  // Beyond this many entries it is cheaper to clear the tile than to undo the scatter.
  static constexpr int kUndoLimit = 512;

 public:
  static constexpr int kThreads = 32 * Config::kWarpsM * Config::kWarpsN;
  static constexpr int kThreadBlocks = Config::kThreadBlocks;

 private:
  static constexpr int kWarpM = 64 / Config::kWarpsM;
  static constexpr int kWarpN = kTileN / Config::kWarpsN;
  static_assert(kStages >= 3, "with two stages nothing is under way while a step is computed");
  static_assert(kChunk % 8 == 0, "a chunk must start where a vector of entries may start");
  using Walk = BlockWalk<kThreads, kChunk, kStages - 1>;
  using XTile = OperandTile<kFeaturesFirst, kTileN, kThreads>;

 public:
  struct alignas(128) Shared {
    uint16_t weight[kWeightTiles][64 * 64];
    uint16_t x[kStages][XTile::kElements];
    uint16_t codes[kStages][kChunk];
    uint16_t values[kStages][kChunk];
    typename Walk::Shared walk;
    int64_t x_offset[kTileN];
    int64_t y_offset[kTileN];
  };

  __device__ __forceinline__ SpmmTile(const SpmmProblem& problem, const TileLaunch& launch, Shared& shared)
      : problem_(problem),
        launch_(launch),
        shared_(shared),
        item_(static_cast<int32_t>(blockIdx.x % launch.items)),
        first_column_(static_cast<int64_t>(blockIdx.x / launch.items) * kTileN),
        columns_(static_cast<int32_t>(min(static_cast<int64_t>(kTileN), problem.y.columns - first_column_))) {}

  __device__ __forceinline__ void run() {
    // Phase 1: the run of blocks and strips of this thread block.
    const int32_t blocks = problem_.blocks_per_strip();
    int32_t first = item_ * blocks, last = first + blocks;
    int32_t strip = item_, last_strip = item_;
    if (launch_.split_strips) {
      first = problem_.units[item_];
      last = problem_.units[item_ + 1];
      if (first >= last) return;
      strip = first / blocks;
      last_strip = (last - 1) / blocks;
    }
    Walk walk(problem_, shared_.walk, first, last);

    // Phase 2: clean weight tiles and the offsets of this thread block's columns.
#pragma unroll
    for (int tile = 0; tile < kWeightTiles; ++tile) clear(shared_.weight[tile]);
    for (int32_t column = thread_idx(); column < columns_; column += kThreads) {
      shared_.x_offset[column] = problem_.x.column_offset(first_column_ + column);
      shared_.y_offset[column] = problem_.y.column_offset(first_column_ + column);
    }
    __syncthreads();

    // Phase 3: fill the pipeline.
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch(walk, stage);

    // Phase 4: one step, or the end of a strip, at a time. A step has a single barrier: behind it the
    // tile of the step before is cleaned, whose next writer comes only behind the next barrier.
    Sum sum;
    sum.clear();
    int32_t stage = 0, tile = 0, previous_stage = kStages - 1, previous_tile = kWeightTiles - 1, previous_count = 0;
    while (true) {
      if (walk.done() || walk.strip() != strip) {
        const bool whole = first <= strip * blocks && (strip + 1) * blocks <= last;
        if (whole) {
          store_output(sum, strip);
        } else {
          store_partial(sum, strip);
        }
        if (strip++ == last_strip) break;
        continue;
      }
      const int32_t count = walk.compute().count;
      copy_async_wait<kStages - 2>();
      scatter(stage, tile, count);
      __syncthreads();
      clean(previous_stage, previous_tile, previous_count);
      fetch(walk, previous_stage);
      sum.template multiply<kTransposed, kFeaturesFirst, kTileN>(shared_.weight[tile], shared_.x[stage], warp_row(),
                                                                 warp_col(), lane_idx());
      previous_stage = stage;
      previous_tile = tile;
      previous_count = count;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      tile = tile + 1 == kWeightTiles ? 0 : tile + 1;
    }
    copy_async_wait<0>();
  }

 private:
  using Sum = WarpTile<Scalar, kWarpM, kWarpN>;

  static __device__ __forceinline__ int32_t thread_idx() { return threadIdx.x; }
  static __device__ __forceinline__ int32_t lane_idx() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int32_t warp_row() { return threadIdx.x / 32 % Config::kWarpsM * kWarpM; }
  static __device__ __forceinline__ int32_t warp_col() { return threadIdx.x / 32 / Config::kWarpsM * kWarpN; }

  // Starts the copies of the next step, if there is one. Every call makes one group of copies.
  __device__ __forceinline__ void fetch(Walk& walk, int32_t stage) {
    WalkStep step;
    if (walk.fetch(step)) {
      load_entries(stage, step);
      const Operand x = make_operand(problem_.x, problem_.in_features(), launch_.x_vectorized);
      XTile::load(shared_.x[stage], x, step.block * 64, shared_.x_offset, columns_, thread_idx());
    }
    copy_async_commit();
  }

  // A thread copies, scatters and cleans the same entries, four at a time, so that entries need no
  // barrier. A vector may reach into the padding at the end of the block, never beyond it.
  __device__ __forceinline__ void load_entries(int32_t stage, const WalkStep& step) {
    const uint16_t* codes = problem_.w.codes + step.begin;
    const uint16_t* values = static_cast<const uint16_t*>(problem_.values) + step.begin;
    for (int32_t e = 4 * thread_idx(); e < step.count; e += 4 * kThreads) {
      copy_async_8(&shared_.codes[stage][e], codes + e);
      if (launch_.values_vectorized) {
        copy_async_8(&shared_.values[stage][e], values + e);
      } else {
        *reinterpret_cast<Vector<uint16_t, 4>*>(&shared_.values[stage][e]) = {values[e], values[e + 1], values[e + 2],
                                                                              values[e + 3]};
      }
    }
  }

  __device__ __forceinline__ void scatter(int32_t stage, int32_t tile, int32_t count) {
    uint16_t* weight = shared_.weight[tile];
    for (int32_t e = 4 * thread_idx(); e < count; e += 4 * kThreads) {
      const Vector<uint16_t, 4> codes = *reinterpret_cast<const Vector<uint16_t, 4>*>(&shared_.codes[stage][e]);
      const Vector<uint16_t, 4> values = *reinterpret_cast<const Vector<uint16_t, 4>*>(&shared_.values[stage][e]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (e + i < count) weight[codes.lane[i]] = values.lane[i];
      }
    }
  }

  // Leaves the tile all zero again. Padding codes point inside the tile, so they need no care here.
  __device__ __forceinline__ void clean(int32_t stage, int32_t tile, int32_t count) {
    if (count > kUndoLimit) {
      clear(shared_.weight[tile]);
      return;
    }
    for (int32_t e = 4 * thread_idx(); e < count; e += 4 * kThreads) {
      const Vector<uint16_t, 4> codes = *reinterpret_cast<const Vector<uint16_t, 4>*>(&shared_.codes[stage][e]);
#pragma unroll
      for (int i = 0; i < 4; ++i) shared_.weight[tile][codes.lane[i]] = 0;
    }
  }

  static __device__ __forceinline__ void clear(uint16_t* tile) {
#pragma unroll
    for (int i = 0; i < 64 * 64 / 8; i += kThreads)
      reinterpret_cast<uint4*>(tile)[i + thread_idx()] = uint4{0, 0, 0, 0};
  }

  // Hands every sum to store(row, column, sum) and leaves zeros. The sums move through the first
  // fragment of each row so that the code of an activation is not repeated for every register.
  template <typename Store>
  static __device__ __forceinline__ void drain(Sum& sum, Store&& store) {
#pragma unroll 1
    for (int j = 0; j < Sum::kColTiles; ++j) {
#pragma unroll
      for (int i = 0; i < Sum::kRowTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          store(warp_row() + 16 * i + 8 * (e / 2) + lane_idx() / 4, warp_col() + 8 * j + 2 * (lane_idx() % 4) + e % 2,
                sum.sum[i][0][e]);
#pragma unroll
          for (int next = 1; next < Sum::kColTiles; ++next) sum.sum[i][next - 1][e] = sum.sum[i][next][e];
          sum.sum[i][Sum::kColTiles - 1][e] = 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void store_output(Sum& sum, int32_t strip) {
    const Epilogue<Scalar> epilogue = epilogue_of<Scalar>(problem_);
    const int32_t features = problem_.out_features();
    Scalar* y = static_cast<Scalar*>(problem_.y.data);
    drain(sum, [&](int32_t row, int32_t column, float value) {
      const int32_t feature = strip * 64 + row;
      if (feature >= features || column >= columns_) return;
      y[feature * problem_.y.stride_f + shared_.y_offset[column]] = epilogue.finish(value, epilogue.bias_of(feature));
    });
  }

  __device__ __forceinline__ void store_partial(Sum& sum, int32_t strip) {
    const int64_t slot = item_ + strip;
    float* partial = static_cast<float*>(problem_.partials) + slot * 64 * problem_.y.columns + first_column_;
    drain(sum, [&](int32_t row, int32_t column, float value) {
      if (column < columns_) partial[row * problem_.y.columns + column] = value;
    });
  }

  const SpmmProblem& problem_;
  const TileLaunch& launch_;
  Shared& shared_;
  int32_t item_;
  int64_t first_column_;
  int32_t columns_;
};

// grid.x = items x column tiles, items fastest: thread blocks that run together share the columns of X.
// A thread block computes 64 output features x kTileN columns for one strip, or for every strip that
// its unit touches.
template <typename Scalar, bool kTransposed, bool kFeaturesFirst, int kTileN>
__global__ void __launch_bounds__(SpmmTile<Scalar, kTransposed, kFeaturesFirst, kTileN>::kThreads,
                                  SpmmTile<Scalar, kTransposed, kFeaturesFirst, kTileN>::kThreadBlocks)
    spmm_tile(const __grid_constant__ SpmmProblem problem, const __grid_constant__ TileLaunch launch) {
  using Tile = SpmmTile<Scalar, kTransposed, kFeaturesFirst, kTileN>;
  extern __shared__ __align__(128) unsigned char shared[];
  Tile(problem, launch, *reinterpret_cast<typename Tile::Shared*>(shared)).run();
}

}  // namespace csb::cuda
