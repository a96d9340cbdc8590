#pragma once

#include "cuda/device/cluster.cuh"
#include "cuda/device/epilogue.cuh"
#include "cuda/device/launch.cuh"

namespace csb::cuda {

// What the launcher finds out once for all thread blocks.
struct SpmvLaunch {
  bool split_strips;  // a thread block walks a unit, else a strip with the others of its cluster
  int32_t cluster;    // thread blocks that share a strip, 1 when split_strips
};

// One column. Every lane of every warp has sums of its own for the 64 output features of a strip, at
// [feature][lane] in shared memory: a lane adds into its own bank, so that neither the order of the
// entries nor their pattern can make two lanes meet, in either direction, and no entry is sorted.
// The lanes' sums are added up in a fixed order at the end of a strip.
//
// Entries move in chunks of eight; a warp takes 32 chunks at a time, over block borders.
template <typename T, bool kTransposed>
class Spmv {
  using Acc = AccOf<T>;
  static constexpr int kWarps = 4;
  static constexpr int kChunk = 8;
  static constexpr unsigned kFullWarp = 0xffffffffu;
  static constexpr int kShift = 6;
  static constexpr int kStages = 3;
  static constexpr int kPieces = 1 + kChunk * sizeof(T) / 16;
  static constexpr int kVectorCount = 16 / sizeof(Acc);

 public:
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kThreadBlocks = sizeof(T) == 2 ? 5 : sizeof(T) == 4 ? 4 : 2;

  struct alignas(16) Shared {
    Acc sums[kWarps][64][32];
    uint4 entries[kWarps][kStages][kPieces][32];
  };

  __device__ __forceinline__ Spmv(const SpmmProblem& problem, const SpmvLaunch& launch, Shared& shared)
      : problem_(problem), launch_(launch), shared_(shared), blocks_(problem.blocks_per_strip()) {}

  __device__ __forceinline__ void run() {
    Vector<Acc, kVectorCount>* sums = reinterpret_cast<Vector<Acc, kVectorCount>*>(shared_.sums[warp_idx()]);
#pragma unroll 4
    for (int i = lane_idx(); i < 64 * 32 / kVectorCount; i += 32) sums[i] = {};
    wait_for_previous_kernel();
    allow_dependent_kernel();
    const int32_t item = static_cast<int32_t>(blockIdx.x) / launch_.cluster;
    rank_ = static_cast<int32_t>(blockIdx.x) % launch_.cluster;
    int32_t first = item * blocks_, last = first + blocks_, strip = item, last_strip = item;
    if (launch_.split_strips) {
      first = problem_.units[item];
      last = problem_.units[item + 1];
      if (first >= last) return;
      strip = first / blocks_;
      last_strip = (last - 1) / blocks_;
    }
    for (; strip <= last_strip; ++strip) {
      const int32_t strip_begin = strip * blocks_;
      add_blocks(max_of(first, strip_begin), min_of(last, strip_begin + blocks_), strip_begin);
      store(strip, item, first <= strip_begin && strip_begin + blocks_ <= last);
    }
  }

 private:
  static __device__ __forceinline__ int32_t lane_idx() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int32_t warp_idx() { return threadIdx.x / 32; }

  // Up to 32 blocks, one a lane.
  struct Batch {
    int32_t begin = 0;   // first entry
    int32_t stored = 0;  // entries, padding included
    int32_t padding = 0;
  };

  // Eight entries of a lane: their codes, as they stand in memory, and their elements of x.
  struct Chunk {
    uint32_t codes[kChunk / 2];
    T factors[kChunk];
    int32_t count;  // of the entries that are no padding
  };

  // Two codes at a time: rows stand in bits 6 ... 11 of each half, columns, swizzled, in bits 0 ... 5.
  static __device__ __forceinline__ uint32_t rows(uint32_t pair) { return pair >> kShift & 0x003f003fu; }
  static __device__ __forceinline__ uint32_t columns(uint32_t pair) {
    return (pair ^ (pair >> 3 & 0x00380038u)) & 0x003f003fu;
  }

  // Where a lane finds its chunk of a window.
  struct Place {
    int32_t block;  // within its batch
    int32_t count;
  };

  __device__ __forceinline__ Batch read_batch(int32_t position, int32_t last, int32_t strip_begin) const {
    Batch batch;
    position += launch_.cluster * lane_idx();
    if (position < last) {
      const int32_t block = problem_.block_at(position);
      batch.begin = problem_.w.blk_ptr[block];
      batch.stored = problem_.w.blk_ptr[block + 1] - batch.begin;
      batch.padding = problem_.w.blk_pad[block];
      // The block's part of x, so that the first gather from it finds it near.
      prefetch((position - strip_begin) << kShift);
    }
    return batch;
  }

  __device__ __forceinline__ void prefetch(int32_t feature) const {
    constexpr int32_t kLine = 128 / sizeof(T);
#pragma unroll
    for (int32_t line = 0; line < 64; line += kLine) {
      if (feature + line >= problem_.in_features()) break;
      asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const T*>(problem_.x.data) + feature + line));
    }
  }

  __device__ __forceinline__ void add_blocks(int32_t position, int32_t last, int32_t strip_begin) {
    constexpr int32_t kStep = 32 * kWarps;  // chunks from a warp's window to its next
    int32_t window = 32 * warp_idx();
    position += rank_;
    Batch next = read_batch(position, last, strip_begin);
    for (; position < last; position += 32 * launch_.cluster) {
      const Batch batch = next;
      next = read_batch(position + 32 * launch_.cluster, last, strip_begin);

      const int32_t chunks = batch.stored / kChunk;
      int32_t end = chunks;
#pragma unroll
      for (int reach = 1; reach < 32; reach *= 2) {
        const int32_t other = __shfl_up_sync(kFullWarp, end, reach);
        if (lane_idx() >= reach) end += other;
      }
      const int32_t total = __shfl_sync(kFullWarp, end, 31);
      const int32_t start = end - chunks;
      const ChunkMap map = {start, batch.begin - start * kChunk, start * kChunk + batch.stored - batch.padding, total,
                            static_cast<const T*>(problem_.x.data) + (int64_t(position - strip_begin) << kShift)};

      // The entries of three windows are on their way to shared memory, where every lane finds its own,
      // and the elements of x of the next one to registers, while one is added.
      Place places[kStages];
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) fetch(stage, places[stage], map, window + stage * kStep);
      int32_t stage = 0;
      Chunk chunk;
      copy_async_wait<kStages - 1>();
      gather(chunk, stage, places[0], map);
#pragma unroll 1
      for (; window < total; window += kStep) {
        const int32_t next_stage = stage + 1 == kStages ? 0 : stage + 1;
        Chunk next;
        copy_async_wait<kStages - 2>();
        gather(next, next_stage, places[1], map);
        add(chunk, stage);
        chunk = next;
#pragma unroll
        for (int i = 1; i < kStages; ++i) places[i - 1] = places[i];
        fetch(stage, places[kStages - 1], map, window + kStages * kStep);
        stage = next_stage;
      }
      copy_async_wait<0>();
      window -= round_up(total, 32);
    }
  }

  // Where the chunks of a batch are; a lane holds its block's.
  struct ChunkMap {
    int32_t start;  // first chunk
    int32_t shift;  // entry of a chunk minus eight times its number
    int32_t end;    // eight times a chunk's number where the padding begins
    int32_t total;  // chunks of the batch
    const T* x;     // of the batch's first input feature
  };

  // Starts the copies of chunk `window + lane`; the last block that starts no later holds it. A lane that
  // finds no chunk gets zeros. Every call makes one group of copies.
  __device__ __forceinline__ void fetch(int32_t stage, Place& place, const ChunkMap& map, int32_t window) {
    place = {0, 0};
    if (window >= map.total) {
      shared_.entries[warp_idx()][stage][0][lane_idx()] = {0, 0, 0, 0};
    } else {
      const int32_t index = window + lane_idx();
      int32_t block = 0;
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        if (__shfl_sync(kFullWarp, map.start, block + step) <= index) block += step;
      }
      const int32_t shift = __shfl_sync(kFullWarp, map.shift, block);
      const int32_t end = __shfl_sync(kFullWarp, map.end, block);
      const bool inside = index < map.total;
      const uint32_t entry = inside ? shift + index * kChunk : 0u;
      if (inside) place = {block, end - index * kChunk};
      uint4(*pieces)[32] = shared_.entries[warp_idx()][stage];
      copy_async_16_or_zero(&pieces[0][lane_idx()], problem_.w.codes + entry, inside);
#pragma unroll
      for (int v = 0; v < kPieces - 1; ++v) {
        copy_async_16_or_zero(&pieces[v + 1][lane_idx()],
                              static_cast<const T*>(problem_.values) + entry + v * (16 / sizeof(T)), inside);
      }
    }
    copy_async_commit();
  }

  // A padding entry has code 0, an element of x that exists but is not its own and may be NaN.
  __device__ __forceinline__ void gather(Chunk& chunk, int32_t stage, const Place& place, const ChunkMap& map) const {
    const uint4 codes = shared_.entries[warp_idx()][stage][0][lane_idx()];
    chunk.codes[0] = codes.x;
    chunk.codes[1] = codes.y;
    chunk.codes[2] = codes.z;
    chunk.codes[3] = codes.w;
    chunk.count = place.count;
    const T* x = map.x + place.block * (launch_.cluster << kShift);
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      const uint32_t in = kTransposed ? rows(chunk.codes[i / 2]) : columns(chunk.codes[i / 2]);
      chunk.factors[i] = __ldg(element(x, in & 0xffffu));
      chunk.factors[i + 1] = __ldg(element(x, in >> 16));
    }
  }

  // x + index in one instruction; left to itself the compiler splits 64-bit sums into many.
  static __device__ __forceinline__ const T* element(const T* x, uint32_t index) {
    const T* at;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(index), "n"(sizeof(T)), "l"(x));
    return at;
  }

  __device__ __forceinline__ void add(Chunk& chunk, int32_t stage) {
    if (__any_sync(kFullWarp, chunk.count < kChunk)) {
      __syncwarp();  // keeps the compiler from turning a seldom branch into instructions of every turn
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (i >= chunk.count) chunk.factors[i] = T();
      }
    }
    uint32_t values[4 * (kPieces - 1)];
#pragma unroll
    for (int v = 0; v < kPieces - 1; ++v) {
      const uint4 part = shared_.entries[warp_idx()][stage][v + 1][lane_idx()];
      values[4 * v] = part.x;
      values[4 * v + 1] = part.y;
      values[4 * v + 2] = part.z;
      values[4 * v + 3] = part.w;
    }
    uint32_t sums = shared_address(&shared_.sums[warp_idx()][0][lane_idx()]);
    asm volatile("" : "+r"(sums));
    constexpr uint32_t kPitch = 32 * sizeof(Acc);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint32_t pair = chunk.codes[i / 2];
      uint32_t at = sums;
      if constexpr (kTransposed) {
        at += (i % 2 ? columns(pair) >> 16 : columns(pair) & 0xffffu) * kPitch;
      } else if constexpr (kPitch == 128) {
        at += i % 2 ? (pair & 0xffc00000u) >> 15 : (pair & 0xffc0u) << 1;
      } else {
        at += (i % 2 ? pair >> 22 : (pair & 0xffffu) >> 6) * kPitch;
      }
      add_shared(at, unpack<T>(values, i) * to_acc(chunk.factors[i]));
    }
  }

  static __device__ __forceinline__ void add_shared(uint32_t at, float term) {
    float sum;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(sum) : "r"(at));
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(sum + term));
  }
  static __device__ __forceinline__ void add_shared(uint32_t at, double term) {
    double sum;
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(sum) : "r"(at));
    asm volatile("st.shared.f64 [%0], %1;" ::"r"(at), "d"(sum + term));
  }

  // At the end of a strip no entries are under way.
  __device__ __forceinline__ Acc* totals(int warp) { return reinterpret_cast<Acc*>(shared_.entries[warp]); }

  // Hands over the sums of a strip and leaves zeros.
  __device__ __forceinline__ void store(int32_t strip, int32_t item, bool whole) {
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t feature = half * 32 + lane_idx();
      Vector<Acc, kVectorCount>* lanes =
          reinterpret_cast<Vector<Acc, kVectorCount>*>(shared_.sums[warp_idx()][feature]);
      Acc total = 0;
#pragma unroll
      for (int v = 0; v < 32 / kVectorCount; ++v) {
        const int32_t at = (v + lane_idx()) % (32 / kVectorCount);
        const auto part = lanes[at];
#pragma unroll
        for (int i = 0; i < kVectorCount; ++i) total += part.lane[i];
        lanes[at] = {};
      }
      totals(warp_idx())[feature] = total;
    }
    __syncthreads();
    const int32_t row = static_cast<int32_t>(threadIdx.x);
    Acc total = 0;
    if (row < 64) {
      total = totals(0)[row];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) total += totals(warp)[row];
    }
    if (launch_.cluster > 1) {
      if (row < 64) totals(0)[row] = total;
      cluster_sync();
      if (rank_ == 0 && row < 64) {
        for (int32_t rank = 1; rank < launch_.cluster; ++rank) total += read_neighbour(&totals(0)[row], rank);
      }
      cluster_sync();
    }
    if (rank_ == 0 && row < 64) {
      const int32_t feature = strip * 64 + row;
      if (!whole) {
        static_cast<Acc*>(problem_.partials)[int64_t(item + strip) * 64 + row] = total;
      } else if (feature < problem_.out_features()) {
        const Epilogue<T> epilogue = epilogue_of<T>(problem_);
        static_cast<T*>(problem_.y.data)[feature * problem_.y.stride_f] =
            epilogue.finish(total, epilogue.bias_of(feature));
      }
    }
    __syncthreads();
  }

  const SpmmProblem& problem_;
  const SpmvLaunch& launch_;
  Shared& shared_;
  int32_t blocks_;
  int32_t rank_ = 0;  // within the cluster
};

// grid.x = units or strips.
template <typename T, bool kTransposed>
__global__ void __launch_bounds__(Spmv<T, kTransposed>::kThreads, Spmv<T, kTransposed>::kThreadBlocks)
    spmv_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ SpmvLaunch launch) {
  using Kernel = Spmv<T, kTransposed>;
  extern __shared__ __align__(16) unsigned char shared[];
  Kernel(problem, launch, *reinterpret_cast<typename Kernel::Shared*>(shared)).run();
}

}  // namespace csb::cuda
