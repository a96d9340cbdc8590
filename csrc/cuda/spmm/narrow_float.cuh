#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/spmm/warp_walk.cuh"

namespace csb::cuda {

// Eight columns of float32 on CUDA cores, blocks of 64. A warp works alone, as in Narrow: it scatters a
// block's entries into a tile of its own, [input feature][output feature], multiplies all of it with the
// block's part of X, and undoes the scatter. The tile of few entries is mostly zeros, but a product by rows
// of 16 bytes takes fewer instructions than finding the entries' places one by one.
//
// The eight lanes of a quarter warp share the output features: lane l has 4 (l % 8) ... + 3 and 32 more, of all
// columns. The quarters take every fourth input feature each, so that no two lanes read the same of the tile: a
// 16-byte load takes a quarter warp at a time, whether or not the others ask for the same.
//
// kVectors: four neighbouring features of X are one aligned piece of 16 bytes.
template <bool kTransposed, bool kVectors>
class NarrowFloat {
  static constexpr int kWarps = 3;
  static constexpr int kChunks = 2;  // a lane takes so many times eight entries a step
  static constexpr int kStep = kChunks * 32 * 8;
  static constexpr int kColumns = 8;
  // Feature 16 u + 4 w + v of X stands at kXPitch u + kXGap w + kColumns v: the four features that lanes
  // store at once lie in different banks.
  static constexpr int kXGap = 5 * kColumns;
  static constexpr int kXPitch = 19 * kColumns;
  static constexpr unsigned kFullWarp = 0xffffffffu;

 public:
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kThreadBlocks = 4;

  struct alignas(128) Shared {
    float tile[kWarps][64 * 64];
    float x[kWarps][4 * kXPitch];
    WarpRun run;
  };

  __device__ __forceinline__ NarrowFloat(const SpmmProblem& problem, const WarpLaunch& launch, Shared& shared)
      : problem_(problem),
        launch_(launch),
        shared_(shared),
        tile_(shared.tile[threadIdx.x / 32]),
        x_(shared.x[threadIdx.x / 32]),
        blocks_(problem.blocks_per_strip()),
        first_column_(static_cast<int32_t>(blockIdx.y) * kColumns),
        columns_(min_of(kColumns, static_cast<int32_t>(problem.y.columns) - first_column_)) {
    const int32_t column = min_of(lane_idx() % kColumns, columns_ - 1);
    x_column_ = static_cast<const float*>(problem.x.data) + problem.x.column_offset(first_column_ + column);
  }

  __device__ __forceinline__ void run() {
    clear_tile();
    wait_for_previous_kernel();
    allow_dependent_kernel();
    if (!enter_run(problem_, launch_, shared_.run)) return;
    int32_t strip = shared_.run.strip;
    do {
      float sum[2][4][kColumns] = {};
      add_blocks(sum, strip);
      store(sum, strip);
      ++strip;
    } while (launch_.split_strips && strip * blocks_ < shared_.run.last);
  }

 private:
  static __device__ __forceinline__ int32_t lane_idx() { return threadIdx.x % 32; }

  struct Entries {
    uint4 codes[kChunks];  // and then places in the tile
    float4 values[kChunks][2];
    int32_t count;
  };

  __device__ __forceinline__ void add_blocks(float (&sum)[2][4][kColumns], int32_t strip) {
    const int32_t strip_begin = strip * blocks_;
    WarpWalk<kTransposed, kWarps, kStep> walk(problem_, strip, max_of(0, shared_.run.first - strip_begin),
                                              min_of(blocks_, shared_.run.last - strip_begin), shared_.run.rank,
                                              launch_.cluster);
    BlockStep step;
    Entries entries;
    bool more = walk.next(step);
    if (more) load(entries, step);
    while (more) {
      if (step.first) copy_x(step.block);
      find_places(entries);
      for_each(entries, [&](uint32_t place, float value) { tile_[place] = value; });
      const BlockStep here = step;
      const Entries old = entries;
      more = walk.next(step);
      if (more) load(entries, step);  // under way while this block is multiplied
      if (!here.last) continue;
      __syncwarp();
      multiply(sum);
      __syncwarp();
      if (here.first) {
        for_each(old, [&](uint32_t place, float) { tile_[place] = 0.0f; });
      } else {
        clear_tile();
      }
      __syncwarp();
    }
  }

  // Chunk c of lane l holds entries 8 (32 c + l) ... + 7 of the step.
  __device__ __forceinline__ void load(Entries& entries, const BlockStep& step) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int32_t offset = 8 * (32 * c + lane_idx());
      if (offset < step.count) {
        const int64_t entry = int64_t(step.begin) + offset;
        const float4* values = reinterpret_cast<const float4*>(static_cast<const float*>(problem_.values) + entry);
        entries.codes[c] = *reinterpret_cast<const uint4*>(problem_.w.codes + entry);
        entries.values[c][0] = values[0];
        entries.values[c][1] = values[1];
      }
    }
    entries.count = step.count;
  }

  // Where two entries stand in the tile. For W^T that is their code: its swizzle is undone where the tile is read.
  static __device__ __forceinline__ uint32_t places_of(uint32_t codes) {
    if (kTransposed) return codes;
    const uint32_t rows = codes >> 6 & 0x003f003fu;
    const uint32_t cols = (codes ^ (codes >> 3 & 0x00380038u)) & 0x003f003fu;
    return cols << 6 | rows;
  }

  static __device__ __forceinline__ void find_places(Entries& entries) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint4& codes = entries.codes[c];
      codes = {places_of(codes.x), places_of(codes.y), places_of(codes.z), places_of(codes.w)};
    }
  }

  template <typename F>
  static __device__ __forceinline__ void for_each(const Entries& entries, F&& f) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int32_t left = entries.count - 8 * (32 * c + lane_idx());
      const uint32_t places[4] = {entries.codes[c].x, entries.codes[c].y, entries.codes[c].z, entries.codes[c].w};
      const float4 low = entries.values[c][0], high = entries.values[c][1];
      const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      if (left >= 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) f(places[i / 2] >> 16 * (i % 2) & 0xffffu, values[i]);
      } else if (left > 0) {
#pragma unroll
        for (int i = 0; i < 7; ++i) {
          if (i < left) f(places[i / 2] >> 16 * (i % 2) & 0xffffu, values[i]);
        }
      }
    }
  }

  __device__ __forceinline__ void clear_tile() const {
#pragma unroll
    for (int i = 0; i < 64 * 64 / 4; i += 32) reinterpret_cast<float4*>(tile_)[i + lane_idx()] = float4{0, 0, 0, 0};
    __syncwarp();
  }

  // Lane l brings column l % 8.
  __device__ __forceinline__ void copy_x(int32_t block) const {
    const bool inside = lane_idx() % kColumns < columns_;
    const int32_t first = 4 * (lane_idx() / kColumns);
    const int32_t features = inside ? problem_.in_features() - 64 * block - first : 0;
    const float* from = x_column_ + (64 * block + first) * problem_.x.stride_f;
    float* to = x_ + lane_idx() / kColumns * kXGap + lane_idx() % kColumns;
    if constexpr (kVectors) {
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = {0, 0, 0, 0};
        if (16 * i < features) x[i] = *reinterpret_cast<const float4*>(from + 16 * i);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i * kXPitch] = x[i].x;
        to[i * kXPitch + kColumns] = x[i].y;
        to[i * kXPitch + 2 * kColumns] = x[i].z;
        to[i * kXPitch + 3 * kColumns] = x[i].w;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int32_t feature = 16 * i + v;
          to[i * kXPitch + v * kColumns] = feature < features ? from[feature * problem_.x.stride_f] : 0.0f;
        }
      }
    }
  }

  // What a lane needs of an input feature.
  struct Operands {
    float4 w[2];
    float4 x[2];
  };

  // Of input feature 16 u + 4 w + quarter.
  __device__ __forceinline__ void read(Operands& operands, int32_t u, int w) const {
    const int32_t quarter = lane_idx() / 8, out = 4 * (lane_idx() % 8), flip = quarter + 4 * (w % 2);
    const float* row = tile_ + (16 * u + 4 * w + quarter) * 64 + (kTransposed ? out ^ flip << 3 : out);
    const float* x = x_ + kXPitch * u + kXGap * w + kColumns * quarter;
    operands.w[0] = *reinterpret_cast<const float4*>(row);
    // Where the swizzle flips that bit, 32 features further are 32 features less.
    operands.w[1] = *reinterpret_cast<const float4*>(row + (kTransposed && w % 2 == 1 ? -32 : 32));
    operands.x[0] = *reinterpret_cast<const float4*>(x);
    operands.x[1] = *reinterpret_cast<const float4*>(x + 4);
  }

  static __device__ __forceinline__ void add(float (&sum)[2][4][kColumns], const Operands& operands) {
    const float4 low = operands.x[0], high = operands.x[1];
    const float x[kColumns] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float w[4] = {operands.w[h].x, operands.w[h].y, operands.w[h].z, operands.w[h].w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sum[h][r][j] += w[r] * x[j];
      }
    }
  }

  __device__ __forceinline__ void multiply(float (&sum)[2][4][kColumns]) const {
#pragma unroll 1
    for (int32_t u = 0; u < 4; ++u) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        Operands operands;
        read(operands, u, w);
        add(sum, operands);
      }
    }
  }

  // The tiles lend their memory, a fourth to each quarter warp, and are zero again afterwards.
  __device__ __forceinline__ void store(const float (&sum)[2][4][kColumns], int32_t strip) {
    constexpr int kPitch = 64 * 64 / 4;
    float* sums = tile_ + lane_idx() / 8 * kPitch + 4 * (lane_idx() % 8);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float4*>(sums + 64 * j + 32 * h) = {sum[h][0][j], sum[h][1][j], sum[h][2][j], sum[h][3][j]};
      }
    }
    __syncthreads();
    hand_over<float, false, 4 * kWarps, kPitch>(problem_, launch_, shared_.run, strip, first_column_, columns_,
                                                shared_.tile[0]);
    __syncthreads();
    clear_tile();
  }

  const SpmmProblem& problem_;
  const WarpLaunch& launch_;
  Shared& shared_;
  float* tile_;
  float* x_;
  int32_t blocks_;
  int32_t first_column_;
  int32_t columns_;
  const float* x_column_;
};

// grid.x = units, or strips times the thread blocks of a cluster; grid.y = column tiles.
template <bool kTransposed, bool kVectors>
__global__ void __launch_bounds__(NarrowFloat<kTransposed, kVectors>::kThreads,
                                  NarrowFloat<kTransposed, kVectors>::kThreadBlocks)
    narrow_float_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ WarpLaunch launch) {
  using Kernel = NarrowFloat<kTransposed, kVectors>;
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel(problem, launch, *reinterpret_cast<typename Kernel::Shared*>(shared)).run();
}

}  // namespace csb::cuda
