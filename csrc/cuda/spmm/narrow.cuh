#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/spmm/warp_walk.cuh"

namespace csb::cuda {

// Up to 8 columns on the tensor cores, 16-bit, blocks of 64. A warp works alone: it takes every
// fourth block of the thread block's run, scatters its entries into a 64 x 64 tile of its own in shared
// memory (a code is an offset there), multiplies, and undoes the scatter. X is read from memory in the
// very registers that the multiplication wants, since the order of the sum over a block's input
// features is free: lane 4 g + t holds features 8 t ... 8 t + 7 and 32 more of column g.
template <typename Scalar, bool kTransposed>
class Narrow {
  static constexpr int kWarps = 4;
  static constexpr int kChunks = 2;  // a lane takes so many times eight entries a step
  static constexpr int kStep = kChunks * 32 * 8;
  static constexpr int kDummy = 64 * 64;  // element behind the tile, where padding goes
  static constexpr unsigned kFullWarp = 0xffffffffu;

 public:
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kThreadBlocks = 4;

  struct alignas(128) Shared {
    uint16_t tile[kWarps][64 * 64 + 64];
    WarpRun run;
  };

  __device__ __forceinline__ Narrow(const SpmmProblem& problem, const WarpLaunch& launch, Shared& shared)
      : problem_(problem),
        launch_(launch),
        shared_(shared),
        tile_(shared.tile[threadIdx.x / 32]),
        blocks_(problem.blocks_per_strip()) {}

  __device__ __forceinline__ void run() {
    clear_tile();
    wait_for_previous_kernel();
    allow_dependent_kernel();
    if (!enter_run(problem_, launch_, shared_.run)) return;
    int32_t strip = shared_.run.strip;
    do {
      float sum[4][4] = {};
      add_blocks(sum, strip);
      store(sum, strip);
      ++strip;
    } while (launch_.split_strips && strip * blocks_ < shared_.run.last);
  }

 private:
  static __device__ __forceinline__ int32_t lane_idx() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int32_t warp_idx() { return threadIdx.x / 32; }

  struct Entries {
    uint4 codes[kChunks];
    uint4 values[kChunks];
    int32_t count;
  };

  struct XFragments {
    uint4 part[2];
  };

  __device__ __forceinline__ void add_blocks(float (&sum)[4][4], int32_t strip) {
    const int32_t strip_begin = strip * blocks_;
    WarpWalk<kTransposed, kWarps, kStep> walk(problem_, strip, max_of(0, shared_.run.first - strip_begin),
                                              min_of(blocks_, shared_.run.last - strip_begin), shared_.run.rank,
                                              launch_.cluster);
    BlockStep step;
    Entries entries;
    XFragments x;
    bool some = false;  // under way
    while (true) {
      BlockStep next;
      Entries next_entries;
      XFragments next_x = x;
      const bool more = walk.next(next);
      if (more) {
        load(next_entries, next);
        if (next.first) load_x(next_x, next.block);
      }
      if (some) add_step(sum, step, entries, x);
      if (!more) return;
      step = next;
      entries = next_entries;
      x = next_x;
      some = true;
    }
  }

  __device__ __forceinline__ void add_step(float (&sum)[4][4], const BlockStep& step, Entries& entries,
                                           const XFragments& x) const {
    send_padding_behind(entries);
    scatter(entries);
    if (!step.last) return;
    __syncwarp();
    multiply(sum, x);
    __syncwarp();
    if (step.first) {
      undo(entries);
    } else {
      clear_tile();
    }
    __syncwarp();
  }

  // Chunk c of lane l holds entries 8 (32 c + l) ... + 7 of the step.
  __device__ __forceinline__ void load(Entries& entries, const BlockStep& step) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int32_t offset = 8 * (32 * c + lane_idx());
      entries.codes[c] = {0, 0, 0, 0};
      entries.values[c] = {0, 0, 0, 0};
      if (offset < step.count) {
        const int64_t entry = int64_t(step.begin) + offset;
        entries.codes[c] = *reinterpret_cast<const uint4*>(problem_.w.codes + entry);
        entries.values[c] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(problem_.values) + entry);
      }
    }
    entries.count = step.count;
  }

  static __device__ __forceinline__ void send_padding_behind(Entries& entries) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int32_t count = entries.count - 8 * (32 * c + lane_idx());  // that are no padding
      entries.codes[c].x |= behind(count, 0);
      entries.codes[c].y |= behind(count, 2);
      entries.codes[c].z |= behind(count, 4);
      entries.codes[c].w |= behind(count, 6);
    }
  }

  // What turns codes i and i + 1 into kDummy where they are padding; a padding code is 0.
  static __device__ __forceinline__ uint32_t behind(int32_t count, int32_t i) {
    return (count <= i ? kDummy : 0u) | (count <= i + 1 ? static_cast<uint32_t>(kDummy) << 16 : 0u);
  }

  template <typename F>
  static __device__ __forceinline__ void for_each(const Entries& entries, F&& f) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t codes[4] = {entries.codes[c].x, entries.codes[c].y, entries.codes[c].z, entries.codes[c].w};
      const uint32_t values[4] = {entries.values[c].x, entries.values[c].y, entries.values[c].z, entries.values[c].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f(codes[i] & 0xffffu, static_cast<uint16_t>(values[i]));
        f(codes[i] >> 16, static_cast<uint16_t>(values[i] >> 16));
      }
    }
  }

  __device__ __forceinline__ void scatter(const Entries& entries) const {
    for_each(entries, [&](uint32_t code, uint16_t value) { tile_[code] = value; });
  }

  __device__ __forceinline__ void undo(const Entries& entries) const {
    for_each(entries, [&](uint32_t code, uint16_t) { tile_[code] = 0; });
  }

  __device__ __forceinline__ void clear_tile() const {
#pragma unroll
    for (int i = 0; i < 64 * 64 / 8; i += 32) reinterpret_cast<uint4*>(tile_)[i + lane_idx()] = uint4{0, 0, 0, 0};
    __syncwarp();
  }

  __device__ __forceinline__ void load_x(XFragments& x, int32_t block) const {
    const int32_t feature = 64 * block + 8 * (lane_idx() % 4), column = lane_idx() / 4;
    const uint16_t* data = static_cast<const uint16_t*>(problem_.x.data) + feature;
    const bool inside = column < problem_.x.columns;
    if (inside) data += column * problem_.x.stride[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x.part[h] = {0, 0, 0, 0};
      if (inside && feature + 32 * h < problem_.in_features()) {
        x.part[h] = *reinterpret_cast<const uint4*>(data + 32 * h);
      }
    }
  }

  static __device__ __forceinline__ int32_t out_row(int32_t g) { return kTransposed ? g : g / 2 + g % 2 * 4; }

  __device__ __forceinline__ void multiply(float (&sum)[4][4], const XFragments& x) const {
    if constexpr (kTransposed) {
      multiply_columns(sum, x);
    } else {
      multiply_rows(sum, x);
    }
  }

  // A is the tile. One 16-byte load brings eight input features of an output feature, those that the
  // lane's x.part[h] holds. Row g of a fragment is row out_row(g) of the tile, so that the eight lanes that
  // read together find eight different 16-byte columns.
  __device__ __forceinline__ void multiply_rows(float (&sum)[4][4], const XFragments& x) const {
    const int32_t g = out_row(lane_idx() / 4), t = lane_idx() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint16_t* row = tile_ + g * 64 + ((t + 4 * h) ^ g) * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 upper = *reinterpret_cast<const uint4*>(row + i * 1024);
        const uint4 lower = *reinterpret_cast<const uint4*>(row + i * 1024 + 512);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
        multiply_add<Scalar>(sum[i], first, x.part[h].x, x.part[h].y);
        multiply_add<Scalar>(sum[i], second, x.part[h].z, x.part[h].w);
      }
    }
  }

  // A is the tile's transpose. The eight rows of an 8 x 8 matrix must lie in different 16-byte columns of
  // the swizzled tile, so matrix q takes pair (q + t) % 4 of lane t's eight features.
  __device__ __forceinline__ void multiply_columns(float (&sum)[4][4], const XFragments& x) const {
    const int32_t matrix = lane_idx() / 8, t = lane_idx() % 8 / 2, odd = lane_idx() % 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t part[4];
      rotate(part, x.part[h], lane_idx() % 4);
#pragma unroll
      for (int q = 0; q < 4; q += 2) {
        const int32_t row_in_group = 2 * ((q + matrix / 2 + t) % 4) + odd;
        const int32_t row = 8 * (t + 4 * h) + row_in_group;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t a[4];
          load_matrices<true>(a, tile_ + row * 64 + (((2 * i + matrix % 2) ^ row_in_group) * 8));
          multiply_add<Scalar>(sum[i], a, part[q], part[q + 1]);
        }
      }
    }
  }

  static __device__ __forceinline__ void rotate(uint32_t (&out)[4], const uint4& in, int32_t by) {
    const bool one = by & 1, two = by & 2;
    const uint32_t a = one ? in.y : in.x, b = one ? in.z : in.y, c = one ? in.w : in.z, d = one ? in.x : in.w;
    out[0] = two ? c : a;
    out[1] = two ? d : b;
    out[2] = two ? a : c;
    out[3] = two ? b : d;
  }

  // The tiles lend their memory and are zero again afterwards.
  __device__ __forceinline__ void store(const float (&sum)[4][4], int32_t strip) {
    const int32_t g = out_row(lane_idx() / 4), t = lane_idx() % 4;
    float* out = reinterpret_cast<float*>(tile_);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[(2 * t + e % 2) * 64 + 16 * i + 8 * (e / 2) + g] = sum[i][e];
    }
    __syncthreads();
    hand_over<Scalar, true, kWarps, sizeof(shared_.tile[0]) / sizeof(float)>(problem_, launch_, shared_.run, strip, 0,
                                                                             static_cast<int32_t>(problem_.y.columns),
                                                                             reinterpret_cast<float*>(shared_.tile));
    __syncthreads();
    clear_tile();
  }

  const SpmmProblem& problem_;
  const WarpLaunch& launch_;
  Shared& shared_;
  uint16_t* tile_;
  int32_t blocks_;
};

// grid.x = units or strips.
template <typename Scalar, bool kTransposed>
__global__ void __launch_bounds__(Narrow<Scalar, kTransposed>::kThreads, Narrow<Scalar, kTransposed>::kThreadBlocks)
    narrow_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ WarpLaunch launch) {
  using Kernel = Narrow<Scalar, kTransposed>;
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel(problem, launch, *reinterpret_cast<typename Kernel::Shared*>(shared)).run();
}

}  // namespace csb::cuda
