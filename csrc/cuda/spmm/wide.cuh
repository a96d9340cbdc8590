#pragma once

#include <cstddef>

#include "cuda/device/cluster.cuh"
#include "cuda/device/epilogue.cuh"
#include "cuda/device/mbarrier.cuh"
#include "cuda/device/operand_tile.cuh"
#include "cuda/device/scatter.cuh"
#include "cuda/device/wgmma.cuh"

namespace csb::cuda {

// What the launcher finds out once for all thread blocks.
struct WideLaunch {
  int32_t groups;     // of four output strips
  int32_t splits;     // thread blocks of a cluster, which share the input blocks of a group
  bool x_vectorized;  // operand_vectorized()
  bool y_vectorized;  // four neighbouring features of Y are one aligned 8-byte piece
};

// 64 columns a thread block. The product is computed as Y^T = X^T . op(W)^T, so that a tile of X is the
// operand with few rows, read once for two weight tiles.
//
//   12 producer warps         entries ─► scatter ─► weight[kStages][4] ─┐
//   2 consumer warpgroups     X ──────────────────► x[kXStages] ────────┴─► sums
//
// A step is an input block: four blocks of W, one for each strip, and a tile of X. Every third step
// belongs to the same four producer warps. Each undoes what it scattered into its tile six steps ago, fills
// it with a block alone, and has the entries of its next block under way meanwhile. A consumer takes
// two strips and brings half of X. Shared memory is what binds, and behind it latencies: hence many
// warps with few registers.
template <typename Scalar, bool kTransposed, bool kFeaturesFirst>
class Wide {
  static constexpr int kStrips = 4;
  static constexpr int kStages = 6;
  static constexpr int kXStages = 3;
  static constexpr int kConsumers = 2;
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kProducerGroups = 3;
  static constexpr int kProducerWarps = kStrips * kProducerGroups;
  static constexpr int kOwnStages = kStages / kProducerGroups;
  static constexpr int kChunks = 4;      // times 256 entries are loaded a block ahead
  static constexpr int kUndoChunks = 2;  // up to so many the scatter is undone; above, the tile is cleared
  static constexpr int kBatch = 30;      // own steps whose pointers a warp reads at once, plus one
  static constexpr int kTileBytes = 64 * 64 * 2;
  static constexpr int kColumns = 64;
  static constexpr int kSumPitch = 64 * kStrips + 8;  // keeps float2 stores of eight rows apart
  static constexpr unsigned kFullWarp = 0xffffffffu;
  static_assert(kStages % kProducerGroups == 0 && kBatch % kOwnStages == 0, "a warp has tiles of its own");
  static_assert(kXStages >= 3, "X of the next two steps lands while that of a step is read");

 public:
  static constexpr int kThreads = 32 * (kConsumerWarps + kProducerWarps);

  struct alignas(1024) Shared {
    union {
      struct {
        uint16_t weight[kStages][kStrips][64 * 64];
        uint16_t x[kXStages][64 * 64];
      };
      float sum[kColumns][kSumPitch];
    };
    int64_t x_offset[kColumns];
    int64_t y_offset[kColumns];
    MBarrier full[kStages];
    MBarrier empty[kStages];
    MBarrier left;  // sums of this thread block
  };

  __device__ __forceinline__ Wide(const SpmmProblem& problem, const WideLaunch& launch, Shared& shared)
      : problem_(problem),
        launch_(launch),
        shared_(shared),
        rank_(static_cast<int32_t>(blockIdx.x % launch.splits)),
        group_(static_cast<int32_t>(blockIdx.x / launch.splits)),
        first_column_(int64_t(blockIdx.y) * kColumns),
        columns_(static_cast<int32_t>(min_of<int64_t>(kColumns, problem.y.columns - first_column_))) {
    const int32_t blocks = kTransposed ? problem.w.mb : problem.w.kb;
    steps_ = rank_ < blocks ? (blocks - rank_ + launch.splits - 1) / launch.splits : 0;
    // Volatile, so that neither is computed again wherever it is used.
    asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane_idx_));
    asm volatile("mov.u32 %0, %1;\n" : "=r"(base_) : "r"(shared_address(&shared)));
  }

  __device__ __forceinline__ void run() {
    // Phase 1: barriers and the offsets of the columns.
    const int32_t warp_idx = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
    prepare();
    __syncthreads();

    // Phase 2: every warp in its role.
    float sum[64];
    if (warp_idx < kConsumerWarps) {
      consume(sum, warp_idx);
    } else {
      produce(warp_idx - kConsumerWarps);
    }
    __syncthreads();  // the sums overwrite the tiles
    if (warp_idx < kConsumerWarps) {
      leave_sums(sum, warp_idx);
      mbarrier_arrive(left());
    }

    // Phase 3: the cluster's sums, in the order of its thread blocks.
    mbarrier_wait(left(), 0);
    if (launch_.splits > 1) cluster_sync();
    store_output();
    if (launch_.splits > 1) cluster_sync();  // others may still read this thread block's sums
  }

 private:
  __device__ __forceinline__ uint32_t weight_tile(int32_t stage, int32_t index) const {
    return base_ + (stage * kStrips + index) * kTileBytes;
  }
  __device__ __forceinline__ uint32_t x_tile(int32_t step) const {
    return base_ + (kStages * kStrips + step % kXStages) * kTileBytes;
  }
  __device__ __forceinline__ uint32_t full(int32_t stage) const {
    return base_ + static_cast<uint32_t>(offsetof(Shared, full)) + stage * static_cast<uint32_t>(sizeof(MBarrier));
  }
  __device__ __forceinline__ uint32_t empty(int32_t stage) const {
    return base_ + static_cast<uint32_t>(offsetof(Shared, empty)) + stage * static_cast<uint32_t>(sizeof(MBarrier));
  }

  __device__ __forceinline__ uint32_t left() const { return base_ + static_cast<uint32_t>(offsetof(Shared, left)); }

  __device__ __forceinline__ int32_t input_block(int32_t step) const { return rank_ + step * launch_.splits; }
  // Neighbouring strips go to different groups: a run of dense strips is no group's alone.
  __device__ __forceinline__ int32_t strip_at(int32_t index) const { return group_ + index * launch_.groups; }

  __device__ __forceinline__ void prepare() {
    const int32_t thread_idx = threadIdx.x;
    if (thread_idx == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(full(i), kStrips);
        mbarrier_init(empty(i), kConsumerWarps);
      }
      mbarrier_init(left(), 32 * kConsumerWarps);
    }
    if (thread_idx < columns_) {
      shared_.x_offset[thread_idx] = problem_.x.column_offset(first_column_ + thread_idx);
      shared_.y_offset[thread_idx] = problem_.y.column_offset(first_column_ + thread_idx);
    }
  }

  // ---- consumers: the columns of X times two weight tiles

  __device__ __forceinline__ void consume(float (&sum)[64], int32_t warp_idx) const {
    const XPieces pieces = find_x(warp_idx);
    load_x(pieces, warp_idx, 0);
    load_x(pieces, warp_idx, 1);
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
    RingPosition<kStages> stage{0};
    for (int32_t step = 0; step < steps_; ++step) {
      mbarrier_wait(full(stage.slot), stage.parity);
      copy_async_wait<1>();
      fence_async_proxy();  // here rather than in the producers, where it would wait for the loads under way
      meet_consumers();
      const uint64_t a = operand_descriptor<kFeaturesFirst>(x_tile(step), 0);
      const uint64_t b = operand_descriptor<kTransposed>(weight_tile(stage.slot, warp_idx / 4 * 2), kTileBytes);
      products_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        multiply_add_128<Scalar, kFeaturesFirst, kTransposed>(sum, a + k * descriptor_step<kFeaturesFirst>(),
                                                              b + k * descriptor_step<kTransposed>());
      }
      products_commit();
      load_x(pieces, warp_idx, step + 2);  // all consumers are done with the step before
      products_wait<0>();
      if (lane_idx_ == 0) mbarrier_arrive(empty(stage.slot));
      stage.advance(1);
    }
    copy_async_wait<0>();
  }

  static __device__ __forceinline__ void meet_consumers() {
    asm volatile("bar.sync 1, %0;\n" ::"n"(32 * kConsumerWarps) : "memory");
  }

  __device__ __forceinline__ void leave_sums(const float (&sum)[64], int32_t warp_idx) const {
    const int32_t row = 16 * (warp_idx % 4) + lane_idx_ / 4, column = 128 * (warp_idx / 4) + 2 * (lane_idx_ % 4);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      *reinterpret_cast<float2*>(&shared_.sum[row][8 * j + column]) = {sum[4 * j], sum[4 * j + 1]};
      *reinterpret_cast<float2*>(&shared_.sum[row + 8][8 * j + column]) = {sum[4 * j + 2], sum[4 * j + 3]};
    }
  }

  // Where a warp's pieces of eight elements of an X tile come from and go to.
  struct XPieces {
    const uint16_t* from[2];  // in input block 0
    uint32_t bytes[2];        // 0 outside the columns
    int64_t block_stride;
    uint32_t to;
    bool fast;  // every piece is whole or outside
  };

  __device__ __forceinline__ XPieces find_x(int32_t warp_idx) const {
    const int32_t row = 4 * warp_idx + lane_idx_ / 8, piece = lane_idx_ % 8;
    const uint16_t* x = static_cast<const uint16_t*>(problem_.x.data);
    XPieces pieces;
    pieces.block_stride = kFeaturesFirst ? 64 * problem_.x.stride_f : 64;
    pieces.to = tile_offset<64>(row, 8 * piece) * 2;
    pieces.fast = launch_.x_vectorized && (!kFeaturesFirst || columns_ % 8 == 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t column = kFeaturesFirst ? 8 * piece : row + 32 * i;
      const int64_t feature = kFeaturesFirst ? row + 32 * i : 8 * piece;
      const bool inside = column < columns_;
      pieces.from[i] = inside ? x + shared_.x_offset[column] + feature * problem_.x.stride_f : x;
      pieces.bytes[i] = inside ? 16 : 0;
    }
    return pieces;
  }

  // Makes a group of copies in any case.
  __device__ __forceinline__ void load_x(const XPieces& pieces, int32_t warp_idx, int32_t step) const {
    const int32_t block = input_block(step);
    if (step < steps_) {
      if (__builtin_expect(pieces.fast && 64 * (block + 1) <= problem_.in_features(), 1)) {
        const int64_t offset = block * pieces.block_stride;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          copy_async_16_or_zeros(x_tile(step) + pieces.to + i * 32 * 64 * 2, pieces.from[i] + offset, pieces.bytes[i]);
        }
      } else {
        load_x_edge(warp_idx, block, x_tile(step));
      }
    }
    copy_async_commit();
  }

  static __device__ __forceinline__ void copy_async_16_or_zeros(uint32_t to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  }

  // The same element by element: at the edges, and where pieces are not aligned.
  __device__ __forceinline__ void load_x_edge(int32_t warp_idx, int32_t block, uint32_t tile) const {
    const int32_t features = problem_.in_features();
    const uint16_t* x = static_cast<const uint16_t*>(problem_.x.data);
#pragma unroll 4
    for (int32_t i = 0; i < 16; ++i) {
      const int32_t row = 4 * warp_idx + i / 8 * 32 + i / 2 % 4, col = i % 2 * 32 + lane_idx_;
      const int32_t feature = 64 * block + (kFeaturesFirst ? row : col);
      const int32_t column = kFeaturesFirst ? col : row;
      const bool inside = feature < features && column < columns_;
      const uint16_t value = inside ? x[feature * problem_.x.stride_f + shared_.x_offset[column]] : uint16_t(0);
      asm volatile("st.shared.u16 [%0], %1;\n" ::"r"(tile + 2 * tile_offset<64>(row, col)), "h"(value) : "memory");
    }
  }

  // ---- producers: entries to dense tiles

  struct Block {
    int32_t begin = 0;
    int32_t end = 0;
    int32_t padding = 0;
  };

  struct Entries {
    uint4 codes[kChunks];
    uint4 values[kChunks];
  };

  struct Scattered {
    uint4 codes[kUndoChunks];
    int32_t count = 0;
  };

  __device__ __forceinline__ void produce(int32_t producer) const {
    const int32_t quarter = producer % kStrips, group = producer / kStrips;
    // Lane l holds the block of own step first + l and, under way, of first + kBatch + l.
    Block ahead = read_pointers(quarter, group, 0);
    Entries entries = {};
    Scattered scattered[kOwnStages];
#pragma unroll
    for (int own_stage = 0; own_stage < kOwnStages; ++own_stage) {
      clear_tile(weight_tile(group + kProducerGroups * own_stage, index_in_group(quarter, own_stage)), lane_idx_);
    }
    int32_t begin = __shfl_sync(kFullWarp, ahead.begin, 0);
    int32_t count = __shfl_sync(kFullWarp, ahead.end - ahead.padding, 0) - begin;
    load(entries, begin, count);
    uint32_t parity = 1;
    int32_t step = group;
    for (int32_t first = 0; step < steps_; first += kBatch) {
      const int32_t begins = ahead.begin, counts = ahead.end - ahead.padding - ahead.begin;
      ahead = read_pointers(quarter, group, first + kBatch);
      for (int32_t i = 0; i < kBatch && step < steps_; i += kOwnStages, parity ^= 1) {
#pragma unroll
        for (int own_stage = 0; own_stage < kOwnStages; ++own_stage, step += kProducerGroups) {
          if (step >= steps_) break;
          const int32_t next_begin = __shfl_sync(kFullWarp, begins, i + own_stage + 1);
          const int32_t next_count = __shfl_sync(kFullWarp, counts, i + own_stage + 1);
          const int32_t stage = group + kProducerGroups * own_stage;
          const uint32_t tile = weight_tile(stage, index_in_group(quarter, own_stage));
          if (step >= kStages) mbarrier_wait(empty(stage), parity);
          clean(tile, scattered[own_stage]);
#pragma unroll
          for (int c = 0; c < kUndoChunks; ++c) scattered[own_stage].codes[c] = entries.codes[c];
          scattered[own_stage].count = count;
          scatter(tile, entries, begin, count, next_begin, next_count);
          __syncwarp();
          if (lane_idx_ == 0) mbarrier_arrive(full(stage));
          begin = next_begin;
          count = next_count;
        }
      }
    }
  }

  // Which strip a warp takes alternates, so that no warp has a dense strip to itself; a tile is always
  // filled by the same warp.
  static __device__ __forceinline__ int32_t index_in_group(int32_t quarter, int32_t own_step) {
    return (quarter + own_step % kOwnStages) % kStrips;
  }

  __device__ __forceinline__ Block read_pointers(int32_t quarter, int32_t group, int32_t first) const {
    const int32_t own_step = first + lane_idx_;
    const int32_t step = group + kProducerGroups * own_step;
    const int32_t strip = strip_at(index_in_group(quarter, own_step));
    if (step >= steps_ || strip >= (kTransposed ? problem_.w.kb : problem_.w.mb)) return {};
    const int32_t block =
        kTransposed ? input_block(step) * problem_.w.kb + strip : strip * problem_.w.kb + input_block(step);
    return {problem_.w.blk_ptr[block], problem_.w.blk_ptr[block + 1], problem_.w.blk_pad[block]};
  }

  __device__ __forceinline__ void clean(uint32_t tile, const Scattered& old) const {
    if (__any_sync(kFullWarp, old.count > 256 * kUndoChunks)) {
      clear_tile(tile, lane_idx_);
      return;
    }
    const int32_t left = old.count - 8 * lane_idx_;
#pragma unroll
    for (int c = 0; c < kUndoChunks; ++c) {
      // Padding has code 0, and an entry there is to be undone as well.
      if (__any_sync(kFullWarp, 256 * c < left)) store_vector(tile, old.codes[c], uint4{0, 0, 0, 0}, left - 256 * c);
    }
    __syncwarp();
  }

  // Chunk c of lane l holds entries 8 (32 c + l) ... + 7 of the block.
  __device__ __forceinline__ void load(Entries& entries, int32_t begin, int32_t count) const {
    const uint16_t* codes = problem_.w.codes + begin + 8 * lane_idx_;
    const uint16_t* values = static_cast<const uint16_t*>(problem_.values) + begin + 8 * lane_idx_;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      load_vector(entries.codes[c], codes + 256 * c, 256 * c + 8 * lane_idx_ < count);
      load_vector(entries.values[c], values + 256 * c, 256 * c + 8 * lane_idx_ < count);
    }
  }

  // The entries make room for those of the next block as they go.
  __device__ __forceinline__ void scatter(uint32_t tile, Entries& entries, int32_t begin, int32_t count,
                                          int32_t next_begin, int32_t next_count) const {
    const uint16_t* codes = problem_.w.codes + 8 * lane_idx_;
    const uint16_t* values = static_cast<const uint16_t*>(problem_.values) + 8 * lane_idx_;
    const int32_t left = count - 8 * lane_idx_;
    const int32_t next_left = next_count - 8 * lane_idx_;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (__any_sync(kFullWarp, 256 * c < left)) {
        replace_padding(entries.codes[c], entries.values[c], left - 256 * c);
        store_vector(tile, entries.codes[c], entries.values[c], left - 256 * c);
      }
      load_vector(entries.codes[c], codes + next_begin + 256 * c, 256 * c < next_left);
      load_vector(entries.values[c], values + next_begin + 256 * c, 256 * c < next_left);
    }
#pragma unroll 1
    for (int32_t base = 256 * kChunks; base < count; base += 256) {
      uint4 late_codes = {}, late_values = {};
      load_vector(late_codes, codes + begin + base, base < left);
      load_vector(late_values, values + begin + base, base < left);
      replace_padding(late_codes, late_values, left - base);
      store_vector(tile, late_codes, late_values, left - base);
    }
  }

  // ---- the end: every thread block of the cluster adds up and writes its share

  __device__ __forceinline__ void store_output() {
    const Epilogue<Scalar> epilogue = epilogue_of<Scalar>(problem_);
    const int32_t features = problem_.out_features();
    constexpr int kQuads = 64 * kStrips / 4;
    const int32_t items = columns_ * kQuads;
    for (int32_t item = rank_ * kThreads + threadIdx.x; item < items; item += launch_.splits * kThreads) {
      // Neighbouring threads write neighbouring elements of Y.
      const int32_t column = launch_.y_vectorized ? item / kQuads : item % columns_;
      const int32_t quad = launch_.y_vectorized ? item % kQuads : item / columns_;
      const int32_t feature = 64 * strip_at(quad / 16) + 4 * (quad % 16);
      if (feature >= features) continue;
      const float4* share = reinterpret_cast<const float4*>(&shared_.sum[column][4 * quad]);
      float4 total = launch_.splits > 1 ? read_neighbour(share, 0) : *share;
      for (int32_t rank = 1; rank < launch_.splits; ++rank) {
        const float4 other = read_neighbour(share, rank);
        total.x += other.x;
        total.y += other.y;
        total.z += other.z;
        total.w += other.w;
      }
      const float sums[4] = {total.x, total.y, total.z, total.w};
      Vector<Scalar, 4> out;
      Scalar* y = static_cast<Scalar*>(problem_.y.data) + feature * problem_.y.stride_f + shared_.y_offset[column];
      if (launch_.y_vectorized && feature + 4 <= features) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out.lane[i] = epilogue.finish(sums[i], epilogue.bias_of(feature + i));
        *reinterpret_cast<Vector<Scalar, 4>*>(y) = out;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (feature + i < features) {
            y[i * problem_.y.stride_f] = epilogue.finish(sums[i], epilogue.bias_of(feature + i));
          }
        }
      }
    }
  }

  const SpmmProblem& problem_;
  const WideLaunch& launch_;
  Shared& shared_;
  int32_t rank_;
  int32_t group_;
  int64_t first_column_;
  int32_t columns_;
  int32_t steps_;
  int32_t lane_idx_;
  uint32_t base_;  // of shared_, as instructions name it
};

// grid.x = groups of strips x splits, one cluster a group; grid.y = column tiles.
template <typename Scalar, bool kTransposed, bool kFeaturesFirst>
__global__ void __launch_bounds__(Wide<Scalar, kTransposed, kFeaturesFirst>::kThreads, 1)
    wide_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ WideLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = Wide<Scalar, kTransposed, kFeaturesFirst>;
  extern __shared__ __align__(1024) unsigned char shared[];
  Kernel(problem, launch, *reinterpret_cast<typename Kernel::Shared*>(shared)).run();
#else
  __trap();  // the launcher lets no other GPU come here
#endif
}

}  // namespace csb::cuda
