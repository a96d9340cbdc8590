#pragma once

#include "cuda/device/bitmap.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/spmm/warp_walk.cuh"

namespace csb::cuda {

// A bitmap and few columns on the tensor cores, 16-bit. A warp works alone: it takes every kWarps-th block of the
// thread block's run, brings bitmap and values to a ring of its own in shared memory, and expands them straight into
// the registers that the multiplication wants. X is read from memory in the very registers too, since the order of the
// sum over a block's input features is free.
template <typename Scalar, bool kTransposed, int kTileN>
class Bitmap {
  static constexpr int kWarps = kTileN == 8 ? 5 : 4;
  static constexpr int kColTiles = kTileN / 8;
  static constexpr int kFlights = 4;  // blocks on their way, at most; a power of two
  static constexpr int kRowsBytes = kBitmapWords * static_cast<int>(sizeof(BitmapRows));
  static constexpr int kSlackBytes = 16;  // the value behind the last one
  // A full block fits. What is left of the memory is the cache through which X is read.
  static constexpr int kRingBytes = kRowsBytes + 2 * 64 * 64 + kSlackBytes;
  static constexpr unsigned kFullWarp = 0xffffffffu;
  static_assert(64 * kTileN * 4 <= kRingBytes, "the ring lends its memory to the sums");

 public:
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kThreadBlocks = 4;

  struct alignas(128) Shared {
    unsigned char ring[kWarps][kRingBytes];
    WarpRun run;
  };

  __device__ __forceinline__ Bitmap(const SpmmProblem& problem, const WarpLaunch& launch, Shared& shared)
      : problem_(problem),
        launch_(launch),
        shared_(shared),
        ring_(shared_address(shared.ring[threadIdx.x / 32])),
        blocks_(problem.blocks_per_strip()),
        first_column_(static_cast<int32_t>(blockIdx.y) * kTileN),
        x_(static_cast<const uint16_t*>(problem.x.data) + (first_column_ + lane_idx() / 4) * problem.x.stride[2] +
           (kTransposed ? 2 : 4) * (lane_idx() % 4)),
        columns_(static_cast<int32_t>(problem.x.columns) - first_column_ - lane_idx() / 4) {}

  __device__ __forceinline__ void run() {
    wait_for_previous_kernel();
    allow_dependent_kernel();
    if (!enter_run(problem_, launch_, shared_.run)) return;
    int32_t strip = shared_.run.strip;
    do {
      float sum[4][kColTiles][4] = {};
      add_blocks(sum, strip);
      store(sum, strip);
      ++strip;
    } while (launch_.split_strips && strip * blocks_ < shared_.run.last);
  }

 private:
  using Walk = BlockWalk<kTransposed>;

  // The blocks on their way, oldest first; what lane i holds belongs to flight i.
  struct Flights {
    int32_t block = 0;  // of the lane's flight, within the strip
    int32_t at = 0;     // in the ring
    int32_t oldest = 0;
    int32_t count = 0;
    int32_t end = 0;  // of the newest in the ring

    __device__ __forceinline__ int32_t block_of(int32_t flight) const {
      return __shfl_sync(kFullWarp, block, flight & (kFlights - 1));
    }
    __device__ __forceinline__ int32_t begin() const { return __shfl_sync(kFullWarp, at, oldest); }

    // Where the next one could go, -1 where there is no room.
    __device__ __forceinline__ int32_t place(int32_t bytes) const {
      if (count == 0) return 0;
      if (count == kFlights) return -1;
      const int32_t from = begin();
      if (end <= from) return end + bytes <= from ? end : -1;
      if (end + bytes <= kRingBytes) return end;
      return bytes <= from ? 0 : -1;
    }

    __device__ __forceinline__ void add(int32_t new_block, int32_t new_at, int32_t bytes) {
      if (lane_idx() == ((oldest + count) & (kFlights - 1))) {
        block = new_block;
        at = new_at;
      }
      end = new_at + bytes;
      ++count;
    }

    __device__ __forceinline__ void remove() {
      oldest = (oldest + 1) & (kFlights - 1);
      --count;
    }
  };

  static __device__ __forceinline__ int32_t lane_idx() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int32_t warp_idx() { return threadIdx.x / 32; }

  __device__ __forceinline__ void add_blocks(float (&sum)[4][kColTiles][4], int32_t strip) {
    const int32_t strip_begin = strip * blocks_;
    const int32_t first = max_of(0, shared_.run.first - strip_begin);
    // The warps take turns through the whole run, not anew in every strip.
    const int32_t taken = strip_begin + first - shared_.run.first;
    const int32_t turn = launch_.split_strips ? kWarps - 1 - (taken + kWarps - 1 - warp_idx()) % kWarps
                                              : shared_.run.rank * kWarps + warp_idx();
    Walk walk(problem_, strip, first + turn, min_of(blocks_, shared_.run.last - strip_begin), kWarps * launch_.cluster);
    Flights flights;
    WalkedBlock next;
    bool more = walk.next(next);
    send(flights, walk, strip, next, more);
    X x;
    if (flights.count > 0) load_x(x, 64 * flights.block_of(flights.oldest));
    while (flights.count > 0) {
      wait(flights.count - 1);
      __syncwarp();
      const uint32_t rows = ring_ + flights.begin();
      find_rows(rows, rows, lane_idx());
      const int32_t block = flights.block_of(flights.oldest);
      const int32_t after = flights.count > 1 ? flights.block_of(flights.oldest + 1) : more ? next.block : block;
      __syncwarp();
      multiply(sum, x, rows, block, after);
      __syncwarp();
      flights.remove();
      send(flights, walk, strip, next, more);
    }
  }

  // As many blocks as there is room for.
  __device__ __forceinline__ void send(Flights& flights, Walk& walk, int32_t strip, WalkedBlock& next,
                                       bool& more) const {
    while (more) {
      const int32_t pieces = (next.count + 7) >> 3;
      const int32_t bytes = kRowsBytes + 16 * pieces + kSlackBytes;
      const int32_t at = flights.place(bytes);
      if (at < 0) return;
      const int64_t block =
          kTransposed ? int64_t{next.block} * problem_.w.kb + strip : int64_t{strip} * problem_.w.kb + next.block;
      uint32_t to = ring_ + at + 16 * lane_idx();
      copy_async_16_to(to, problem_.w.bitmap + block * kBitmapWords + 4 * lane_idx());
      to += kRowsBytes;
      const uint16_t* from = static_cast<const uint16_t*>(problem_.values) + (next.begin + 8 * lane_idx());
#pragma unroll 1
      for (int32_t left = pieces - lane_idx(); left > 0; left -= 128, to += 4 * 512, from += 4 * 256) {
        copy_async_16_to(to, from);
#pragma unroll
        for (int i = 1; i < 4; ++i) {
          if (left > 32 * i) copy_async_16_to(to + 512 * i, from + 256 * i);
        }
      }
      copy_async_commit();
      flights.add(next.block, at, bytes);
      more = walk.next(next);
    }
  }

  static __device__ __forceinline__ void wait(int32_t pending) {
    if (pending == 0) {
      copy_async_wait<0>();
    } else if (pending == 1) {
      copy_async_wait<1>();
    } else if (pending == 2) {
      copy_async_wait<2>();
    } else {
      copy_async_wait<3>();
    }
  }

  // X at 16 features. Of column 8 j + g, lane 4 g + t holds F: 4 t ... 4 t + 3, T: 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
  using X = uint32_t[kColTiles][2];

  __device__ __forceinline__ void load_x(X& x, int32_t first) const {
    const int32_t left = problem_.in_features() - first - (kTransposed ? 2 : 4) * (lane_idx() % 4);
    const uint16_t* from = x_ + first;
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      const bool inside = 8 * j < columns_ && left > 0;
      if constexpr (kTransposed) {
        x[j][0] = load_or_zero(from, inside);
        x[j][1] = load_or_zero(from + 8, inside && left > 8);
      } else {
        load_or_zero(x[j], from, inside);
      }
      from += 8 * problem_.x.stride[2];
    }
  }

  // Volatile and without a branch, so that they stay where they are: long before their use.
  static __device__ __forceinline__ uint32_t load_or_zero(const uint16_t* from, bool some) {
    uint32_t pair;
    asm volatile("{ .reg .pred some; setp.ne.b32 some, %2, 0; mov.b32 %0, 0; @some ld.global.b32 %0, [%1]; }"
                 : "=r"(pair)
                 : "l"(from), "r"(static_cast<int32_t>(some)));
    return pair;
  }

  static __device__ __forceinline__ void load_or_zero(uint32_t (&pairs)[2], const uint16_t* from, bool some) {
    asm volatile(
        "{ .reg .pred some; setp.ne.b32 some, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; "
        "@some ld.global.v2.b32 {%0, %1}, [%2]; }"
        : "=r"(pairs[0]), "=r"(pairs[1])
        : "l"(from), "r"(static_cast<int32_t>(some)));
  }

  // x: at the block's first features, on return at the next one's. Unrolled further, the instructions would not stay in
  // the cache nearest to the scheduler.
  __device__ __forceinline__ void multiply(float (&sum)[4][kColTiles][4], X& x, uint32_t rows, int32_t block,
                                           int32_t next_block) const {
    const int32_t g = lane_idx() / 4, t = lane_idx() % 4;
    const uint32_t values = rows + kRowsBytes;
    rows += 8 * (kTransposed ? 2 * t : g);
#pragma unroll 2
    for (int part = 0; part < 4; ++part) {
      X next_x;
      load_x(next_x, part < 3 ? 64 * block + 16 * (part + 1) : 64 * next_block);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        if constexpr (kTransposed) {
          BitmapRows even, odd;
          load_rows(even, odd, rows + 256 * i);
          ColumnExpander(g).expand(a, even, odd, values);
        } else {
          RowExpander(t).expand(a, load_rows(rows + 64 * i), values);
        }
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) multiply_add<Scalar>(sum[i][j], a, x[j][0], x[j][1]);
      }
      rows += kTransposed ? 64 : 256;
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
        x[j][0] = next_x[j][0];
        x[j][1] = next_x[j][1];
      }
    }
  }

  static __device__ __forceinline__ BitmapRows load_rows(uint32_t address) {
    BitmapRows rows;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(rows.bits), "=r"(rows.starts) : "r"(address));
    return rows;
  }

  static __device__ __forceinline__ void load_rows(BitmapRows& even, BitmapRows& odd, uint32_t address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(even.bits), "=r"(even.starts), "=r"(odd.bits), "=r"(odd.starts)
                 : "r"(address));
  }

  static __device__ __forceinline__ int32_t out_feature(int32_t i, int32_t e, int32_t g) {
    return 16 * i + (kTransposed ? 2 * g + e / 2 : 8 * (e / 2) + g);
  }

  __device__ __forceinline__ void store(const float (&sum)[4][kColTiles][4], int32_t strip) {
    const int32_t g = lane_idx() / 4, t = lane_idx() % 4;
    float* out = reinterpret_cast<float*>(shared_.ring[threadIdx.x / 32]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[(8 * j + 2 * t + e % 2) * 64 + out_feature(i, e, g)] = sum[i][j][e];
      }
    }
    __syncthreads();
    const int32_t columns = min_of(kTileN, static_cast<int32_t>(problem_.y.columns) - first_column_);
    hand_over<Scalar, true, kWarps, kRingBytes / sizeof(float)>(problem_, launch_, shared_.run, strip, first_column_,
                                                                columns, reinterpret_cast<float*>(shared_.ring));
    __syncthreads();
  }

  const SpmmProblem& problem_;
  const WarpLaunch& launch_;
  Shared& shared_;
  uint32_t ring_;  // shared-memory address
  int32_t blocks_;
  int32_t first_column_;
  const uint16_t* x_;  // the lane's first column, at its feature of every 16
  int32_t columns_;    // from there on
};

// grid.x = units or strips, grid.y = tiles of columns.
template <typename Scalar, bool kTransposed, int kTileN>
__global__ void __launch_bounds__(Bitmap<Scalar, kTransposed, kTileN>::kThreads,
                                  Bitmap<Scalar, kTransposed, kTileN>::kThreadBlocks)
    bitmap_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ WarpLaunch launch) {
  using Kernel = Bitmap<Scalar, kTransposed, kTileN>;
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel(problem, launch, *reinterpret_cast<typename Kernel::Shared*>(shared)).run();
}

}  // namespace csb::cuda
