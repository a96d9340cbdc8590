#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/device/mbarrier.cuh"
#include "cuda/device/operand_tile.cuh"
#include "cuda/device/wgmma.cuh"

namespace csb::cuda {

// What the launcher finds out once for all thread blocks.
struct WideLaunch {
  int32_t groups;          // of four output strips
  int32_t splits;          // thread blocks of a cluster, which share the input blocks of a group
  bool x_vectorized;       // operand_vectorized()
  bool y_vectorized;       // four neighbouring features of Y are one aligned 8-byte piece
};

// kConsumers x 64 columns a thread block. The product is computed as Y^T = X^T . op(W)^T, so that a
// tile of X is the operand with few rows, read once for four weight tiles.
//
//   producer warps   entries ─► scatter ─► weight[kStages][4] ─┬─► consumer warpgroups (sums)
//                    X ───────────────────► x[kXStages] ───────┘
//
// A step is an input block: four blocks of W, one for each strip, and a tile of X. A producer warp takes
// a block alone and cleans the tile that it filled kStages steps ago when the consumers are done with
// it; it brings a quarter of the X tile too, kAhead of its own steps ahead.
template <typename Scalar, bool kTransposed, bool kFeaturesFirst, int kConsumers>
class Wide {
  static constexpr int kStrips = 4;
  static constexpr int kStages = 4;
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kProducerGroups = kConsumers == 1 ? 2 : 1;
  static constexpr int kProducerWarps = kStrips * kProducerGroups;
  static constexpr int kOwnStages = kStages / kProducerGroups;
  static constexpr int kAhead = 2;
  static constexpr int kXStages = kStages + kAhead * kProducerGroups;
  static constexpr int kChunks = 5;      // times 256 entries of a block are loaded a step ahead
  static constexpr int kUndoChunks = 2;  // up to so many the scatter is undone; above, the tile is cleared
  static constexpr int kPrefetch = 4;    // own steps between the first word of a block to L2 and its load
  static constexpr int kTileBytes = 64 * 64 * 2;
  static constexpr int kColumns = 64 * kConsumers;
  static constexpr int kSumPitch = 64 * kStrips + 8;  // keeps float2 stores of eight rows apart
  static constexpr unsigned kFullWarp = 0xffffffffu;
  static_assert(kOwnStages % 2 == 0, "entries alternate between two sets of registers");

 public:
  static constexpr int kThreads = 32 * (kConsumerWarps + kProducerWarps);

  struct alignas(1024) Shared {
    union {
      struct {
        uint16_t weight[kStages][kStrips][64 * 64];
        uint16_t x[kXStages][kConsumers][64 * 64];
      };
      float sum[kColumns][kSumPitch];
    };
    int64_t x_offset[kColumns];
    int64_t y_offset[kColumns];
    MBarrier full[kStages];
    MBarrier empty[kStages];
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
  }

  __device__ __forceinline__ void run() {
    // Phase 1: barriers, offsets of the columns, and zeros wherever a tile will stand.
    prepare();
    __syncthreads();

    // Phase 2: every warp in its role.
    const int32_t warp_idx = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
    float sum[128];
    if (warp_idx < kConsumerWarps) {
      consume(sum, warp_idx / 4);
    } else {
      produce(warp_idx - kConsumerWarps);
    }

    // Phase 3: the cluster's sums, in the order of its thread blocks.
    __syncthreads();  // the sums overwrite the tiles
    if (warp_idx < kConsumerWarps) leave_sums(sum, warp_idx);
    if (launch_.splits > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
    store_output();
    if (launch_.splits > 1) cluster_sync();  // others may still read this thread block's sums
  }

 private:
  static __device__ __forceinline__ int32_t lane_idx() { return threadIdx.x % 32; }

  __device__ __forceinline__ int32_t input_block(int32_t step) const { return rank_ + step * launch_.splits; }
  // Neighbouring strips go to different groups: a run of dense strips is no group's alone.
  __device__ __forceinline__ int32_t strip_at(int32_t index) const { return group_ + index * launch_.groups; }

  __device__ __forceinline__ void prepare() {
    const int32_t thread_idx = threadIdx.x;
    if (thread_idx == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(&shared_.full[i], kStrips);
        mbarrier_init(&shared_.empty[i], kConsumerWarps);
      }
    }
    for (int32_t column = thread_idx; column < columns_; column += kThreads) {
      shared_.x_offset[column] = problem_.x.column_offset(first_column_ + column);
      shared_.y_offset[column] = problem_.y.column_offset(first_column_ + column);
    }
    constexpr int kPieces = (sizeof(shared_.weight) + sizeof(shared_.x)) / 16;
    uint4* tiles = reinterpret_cast<uint4*>(&shared_);
    for (int32_t i = thread_idx; i < kPieces; i += kThreads) tiles[i] = uint4{0, 0, 0, 0};
    fence_async_proxy();
  }

  // ---- consumers: 64 columns of X times four weight tiles

  __device__ __forceinline__ void consume(float (&sum)[128], int32_t consumer) {
#pragma unroll
    for (int i = 0; i < 128; ++i) sum[i] = 0.0f;
    RingPosition<kStages> stage;
    RingPosition<kXStages> x;
    int32_t last = 0;
    for (int32_t step = 0; step < steps_; ++step) {
      mbarrier_wait(&shared_.full[stage.slot], stage.parity);
      fence_async_proxy();  // here rather than in the producers, whose loads under way it would wait for
      const uint64_t a = operand_descriptor<kFeaturesFirst>(shared_.x[x.slot][consumer], 0);
      const uint64_t b = operand_descriptor<kTransposed>(shared_.weight[stage.slot], kTileBytes);
      products_begin();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        multiply_add_256<Scalar, kFeaturesFirst, kTransposed>(sum, a + k * descriptor_step<kFeaturesFirst>(),
                                                              b + k * descriptor_step<kTransposed>());
      }
      products_commit();
      products_wait<1>();
      if (step > 0 && lane_idx() == 0) mbarrier_arrive(&shared_.empty[last]);
      last = stage.slot;
      stage.advance();
      x.advance();
    }
    products_wait<0>();
  }

  __device__ __forceinline__ void leave_sums(const float (&sum)[128], int32_t warp_idx) {
    const int32_t row = 16 * warp_idx + lane_idx() / 4, column = 2 * (lane_idx() % 4);
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      *reinterpret_cast<float2*>(&shared_.sum[row][8 * j + column]) = {sum[4 * j], sum[4 * j + 1]};
      *reinterpret_cast<float2*>(&shared_.sum[row + 8][8 * j + column]) = {sum[4 * j + 2], sum[4 * j + 3]};
    }
  }

  // ---- producers: entries to dense tiles, and X

  struct Block {
    int32_t begin = 0;
    int32_t count = 0;
  };

  // Lane l holds the blocks of own steps first + l and first + 32 + l.
  struct Pointers {
    Block now, next;
    int32_t first = 0;

    __device__ __forceinline__ Block at(int32_t own_step) const {
      const int32_t lane = own_step - first;
      const bool later = lane >= 32;
      return {__shfl_sync(kFullWarp, later ? next.begin : now.begin, lane & 31),
              __shfl_sync(kFullWarp, later ? next.count : now.count, lane & 31)};
    }
  };

  __device__ __forceinline__ int32_t step_of(int32_t producer, int32_t own_step) const {
    return producer / kStrips + kProducerGroups * own_step;
  }

  // Which strip a warp takes changes with the stage, so that no warp has a dense strip to itself; a tile
  // is always filled by the same warp.
  static __device__ __forceinline__ int32_t index_in_group(int32_t producer, int32_t step) {
    return (producer + step) % kStrips;
  }

  __device__ __forceinline__ Block read_pointers(int32_t producer, int32_t first) const {
    const int32_t step = step_of(producer, first + lane_idx());
    const int32_t strip = strip_at(index_in_group(producer, step));
    if (step >= steps_ || strip >= problem_.strips()) return {};
    const int32_t block =
        kTransposed ? input_block(step) * problem_.w.kb + strip : strip * problem_.w.kb + input_block(step);
    const int32_t begin = problem_.w.blk_ptr[block];
    return {begin, problem_.w.blk_ptr[block + 1] - problem_.w.blk_pad[block] - begin};
  }

  // Where the pieces of eight elements of a warp's quarter of an X tile come from and go to.
  struct XPieces {
    const uint16_t* from[kConsumers][4];  // in input block 0; null outside the columns
    int64_t block_stride;
    int32_t to;
    bool fast;  // every piece is whole or outside
  };

  struct Entries {
    uint4 codes[kChunks];
    uint4 values[kChunks];
  };

  struct Scattered {
    uint4 codes[kUndoChunks];
    int32_t count = 0;
  };

  __device__ __forceinline__ void produce(int32_t producer) {
    Pointers pointers;
    pointers.now = read_pointers(producer, 0);
    pointers.next = read_pointers(producer, 32);
    const int32_t group = producer / kStrips;
    const int32_t own_steps = group < steps_ ? (steps_ - group + kProducerGroups - 1) / kProducerGroups : 0;

    const XPieces pieces = find_x(producer);
    Entries entries = {};
    Scattered scattered[kOwnStages];
    Block block = pointers.at(0);
    load(entries, block);
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) load_x(pieces, producer, i);
#pragma unroll 1
    for (int i = 1; i < kPrefetch; ++i) prefetch(pointers.at(i));
    uint32_t parity = 1;
    for (int32_t own_step = 0; own_step < own_steps; parity ^= 1) {
#pragma unroll
      for (int own_stage = 0; own_stage < kOwnStages; ++own_stage, ++own_step) {
        if (own_step >= own_steps) break;
        if (own_step - pointers.first == 31) {
          pointers.now = pointers.next;
          pointers.first += 32;
          pointers.next = read_pointers(producer, pointers.first + 32);
        }
        const Block next = pointers.at(own_step + 1);
        prefetch(pointers.at(own_step + kPrefetch));
        const int32_t stage = group + kProducerGroups * own_stage;
        uint16_t* tile = shared_.weight[stage][index_in_group(producer, stage)];
        if (own_step >= kOwnStages) mbarrier_wait(&shared_.empty[stage], parity);
        load_x(pieces, producer, own_step + kAhead);  // its place was read last in the step just waited for
        clean(tile, scattered[own_stage]);
#pragma unroll
        for (int c = 0; c < kUndoChunks; ++c) scattered[own_stage].codes[c] = entries.codes[c];
        scattered[own_stage].count = block.count;
        scatter(tile, entries, block, next);
        copy_async_wait<kAhead>();
        __syncwarp();
        if (lane_idx() == 0) mbarrier_arrive(&shared_.full[stage]);
        block = next;
      }
    }
  }

  __device__ __forceinline__ XPieces find_x(int32_t producer) const {
    const int32_t row = 4 * (producer % kStrips) + lane_idx() / 8, piece = lane_idx() % 8;
    XPieces pieces;
    pieces.block_stride = kFeaturesFirst ? 64 * problem_.x.stride_f : 64;
    pieces.to = tile_offset<64>(row, 8 * piece);
    pieces.fast = launch_.x_vectorized && (!kFeaturesFirst || columns_ % 8 == 0);
#pragma unroll
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t column = 64 * consumer + (kFeaturesFirst ? 8 * piece : row + 16 * i);
        const int64_t feature = kFeaturesFirst ? row + 16 * i : 8 * piece;
        const uint16_t* x = static_cast<const uint16_t*>(problem_.x.data) + feature * problem_.x.stride_f;
        pieces.from[consumer][i] = column < columns_ ? x + shared_.x_offset[column] : nullptr;
      }
    }
    return pieces;
  }

  // This warp's quarter of an X tile; makes a group of copies in any case.
  __device__ __forceinline__ void load_x(const XPieces& pieces, int32_t producer, int32_t own_step) const {
    const int32_t step = step_of(producer, own_step);
    const int32_t block = input_block(step);
    if (step < steps_) {
      if (__builtin_expect(pieces.fast && 64 * (block + 1) <= problem_.in_features(), 1)) {
        uint16_t* tile = shared_.x[step % kXStages][0] + pieces.to;
        const int64_t offset = block * pieces.block_stride;
#pragma unroll
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint16_t* from = pieces.from[consumer][i];
            if (from != nullptr) copy_async_16(tile + (4 * consumer + i) * 16 * 64, from + offset);
          }
        }
      } else {
        load_x_edge(producer, step);
      }
    }
    copy_async_commit();
  }

  // The same element by element: at the edges, and where pieces are not aligned.
  __device__ __forceinline__ void load_x_edge(int32_t producer, int32_t step) const {
    const int32_t first = 64 * input_block(step), features = problem_.in_features();
#pragma unroll 8
    for (int32_t i = 0; i < 32 * kConsumers; ++i) {
      const int32_t consumer = i / 32;
      const int32_t row = 4 * (producer % kStrips) + i / 8 % 4 * 16 + i / 2 % 4, col = i % 2 * 32 + lane_idx();
      const int32_t feature = first + (kFeaturesFirst ? row : col);
      const int32_t column = 64 * consumer + (kFeaturesFirst ? col : row);
      uint16_t value = 0;
      if (feature < features && column < columns_) {
        value = static_cast<const uint16_t*>(problem_.x.data)[feature * problem_.x.stride_f + shared_.x_offset[column]];
      }
      shared_.x[step % kXStages][consumer][tile_offset<64>(row, col)] = value;
    }
  }

  __device__ __forceinline__ void prefetch(const Block& block) const {
    if (block.count <= 0 || lane_idx() >= 2) return;
    const uint16_t* from = lane_idx() == 0 ? problem_.w.codes : static_cast<const uint16_t*>(problem_.values);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(from + block.begin),
                 "r"(round_up(block.count, 8) * 2)
                 : "memory");
  }

  // Eight entries; they may reach into the padding at the end of the block, never beyond it. Where there
  // are none the registers keep what they hold: a branch or a copy would wait for the load.
  static __device__ __forceinline__ void load_vector(uint4& into, const uint16_t* from, bool some) {
    asm volatile(
        "{\n"
        ".reg .pred some;\n"
        "setp.ne.b32 some, %5, 0;\n"
        "@some ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "+r"(into.x), "+r"(into.y), "+r"(into.z), "+r"(into.w)
        : "l"(from), "r"(static_cast<int32_t>(some)));
  }

  // Chunk c of lane l holds entries 8 (32 c + l) ... + 7 of the block.
  __device__ __forceinline__ void load(Entries& entries, const Block& block) const {
    const uint16_t* codes = problem_.w.codes + block.begin + 8 * lane_idx();
    const uint16_t* values = static_cast<const uint16_t*>(problem_.values) + block.begin + 8 * lane_idx();
    const int32_t count = block.count - 8 * lane_idx();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      load_vector(entries.codes[c], codes + 256 * c, 256 * c < count);
      load_vector(entries.values[c], values + 256 * c, 256 * c < count);
    }
  }

  // Padding has code 0 like an entry at (0, 0), which is a block's first if there is one: the first entry
  // is stored behind all others, and the values of padding are made 0.
  // The entries make room for those of the block after it as they go.
  __device__ __forceinline__ void scatter(uint16_t* tile, Entries& entries, const Block& block,
                                          const Block& next) const {
    const int32_t count = block.count - 8 * lane_idx();
#pragma unroll 1
    for (int32_t base = (block.count - 1) & ~255; base >= 256 * kChunks; base -= 256) {
      if (base < count) {
        const int64_t entry = int64_t(block.begin) + base + 8 * lane_idx();
        const uint4 codes = *reinterpret_cast<const uint4*>(problem_.w.codes + entry);
        uint4 values = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(problem_.values) + entry);
        clear_padding(values, count - base);
        store_vector(tile, codes, values);
      }
    }
    const uint32_t first_code = entries.codes[0].x & 0xffffu;
    const uint16_t first_value = static_cast<uint16_t>(entries.values[0].x);
    const uint16_t* next_codes = problem_.w.codes + next.begin + 8 * lane_idx();
    const uint16_t* next_values = static_cast<const uint16_t*>(problem_.values) + next.begin + 8 * lane_idx();
    const int32_t next_count = next.count - 8 * lane_idx();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (256 * c < count) {
        clear_padding(entries.values[c], count - 256 * c);
        store_vector(tile, entries.codes[c], entries.values[c]);
      }
      load_vector(entries.codes[c], next_codes + 256 * c, 256 * c < next_count);
      load_vector(entries.values[c], next_values + 256 * c, 256 * c < next_count);
    }
    __syncwarp();
    if (count > 0 && lane_idx() == 0) tile[first_code] = first_value;
  }

  static __device__ __forceinline__ void clear_padding(uint4& values, int32_t left) {
    if (left >= 8) return;
    const auto keep = [](int32_t left, uint32_t pair) { return left >= 2 ? pair : left == 1 ? pair & 0xffffu : 0u; };
    values = {keep(left, values.x), keep(left - 2, values.y), keep(left - 4, values.z), keep(left - 6, values.w)};
  }

  static __device__ __forceinline__ void store_vector(uint16_t* tile, const uint4& codes, const uint4& values) {
    store_pair(tile, codes.x, values.x);
    store_pair(tile, codes.y, values.y);
    store_pair(tile, codes.z, values.z);
    store_pair(tile, codes.w, values.w);
  }

  static __device__ __forceinline__ void store_pair(uint16_t* tile, uint32_t codes, uint32_t values) {
    tile[codes & 0xffffu] = static_cast<uint16_t>(values);
    tile[codes >> 16] = static_cast<uint16_t>(values >> 16);
  }

  __device__ __forceinline__ void clean(uint16_t* tile, const Scattered& old) const {
    if (old.count > 256 * kUndoChunks) {
#pragma unroll
      for (int i = 0; i < 64 * 64 / 8; i += 32) reinterpret_cast<uint4*>(tile)[i + lane_idx()] = uint4{0, 0, 0, 0};
    } else {
#pragma unroll
      for (int c = 0; c < kUndoChunks; ++c) {
        if (8 * (32 * c + lane_idx()) < old.count) {
          store_vector(tile, old.codes[c], uint4{0, 0, 0, 0});
        }
      }
    }
    __syncwarp();
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
      float4 total = *share;
      if (launch_.splits > 1) {
        total = cluster_load(share, 0);
        for (int32_t rank = 1; rank < launch_.splits; ++rank) {
          const float4 other = cluster_load(share, rank);
          total.x += other.x;
          total.y += other.y;
          total.z += other.z;
          total.w += other.w;
        }
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
};

// grid.x = groups of strips x splits, one cluster a group; grid.y = column tiles.
template <typename Scalar, bool kTransposed, bool kFeaturesFirst, int kConsumers>
__global__ void __launch_bounds__(Wide<Scalar, kTransposed, kFeaturesFirst, kConsumers>::kThreads, 1)
    wide_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ WideLaunch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Kernel = Wide<Scalar, kTransposed, kFeaturesFirst, kConsumers>;
  extern __shared__ __align__(1024) unsigned char shared[];
  Kernel(problem, launch, *reinterpret_cast<typename Kernel::Shared*>(shared)).run();
#else
  __trap();  // the launcher lets no other GPU come here
#endif
}

}  // namespace csb::cuda
