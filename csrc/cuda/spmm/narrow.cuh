#pragma once

#include "cuda/device/cluster.cuh"
#include "cuda/device/epilogue.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"

namespace csb::cuda {

// What the launcher finds out once for all thread blocks.
struct NarrowLaunch {
  bool split_strips;  // a thread block walks a unit, else a strip with the others of its cluster
  int32_t cluster;    // thread blocks that share a strip, 1 when split_strips
};

// Up to 8 or 16 columns on the tensor cores, 16-bit, blocks of 64. A warp works alone: it takes every
// fourth block of the thread block's run, scatters its entries into a 64 x 64 tile of its own in shared
// memory (a code is an offset there), multiplies, and undoes the scatter. X is read from memory in the
// very registers that the multiplication wants, since the order of the sum over a block's input
// features is free: lane 4 g + t holds features 8 t ... 8 t + 7 and 32 more of column g.
template <typename Scalar, bool kTransposed, int kTileN>
class Narrow {
  static constexpr int kWarps = 4;
  static constexpr int kColTiles = kTileN / 8;
  static constexpr int kChunks = 2;  // a lane takes so many times eight entries a step
  static constexpr int kStep = kChunks * 32 * 8;
  static constexpr int kDummy = 64 * 64;  // element behind the tile, where padding goes
  static constexpr unsigned kFullWarp = 0xffffffffu;

 public:
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kThreadBlocks = kTileN == 8 ? 4 : 3;

  struct alignas(128) Shared {
    uint16_t tile[kWarps][64 * 64 + 64];
    // What the thread block works on, kept here because registers are short.
    int32_t item;
    int32_t rank;   // within the cluster
    int32_t first;  // block positions
    int32_t last;
  };

  __device__ __forceinline__ Narrow(const SpmmProblem& problem, const NarrowLaunch& launch, Shared& shared)
      : problem_(problem),
        launch_(launch),
        shared_(shared),
        tile_(shared.tile[threadIdx.x / 32]),
        blocks_(problem.blocks_per_strip()) {}

  __device__ __forceinline__ void run() {
    clear_tile();
    wait_for_previous_kernel();
    allow_dependent_kernel();
    const int32_t item = static_cast<int32_t>(blockIdx.x) / launch_.cluster;
    int32_t first = item * blocks_, last = first + blocks_, strip = item;
    if (launch_.split_strips) {
      first = problem_.units[item];
      last = problem_.units[item + 1];
      if (first >= last) return;
      strip = first / blocks_;
    }
    if (threadIdx.x == 0) {
      shared_.item = item;
      shared_.rank = static_cast<int32_t>(blockIdx.x) % launch_.cluster;
      shared_.first = first;
      shared_.last = last;
    }
    __syncthreads();
    do {
      float sum[4][kColTiles][4] = {};
      add_blocks(sum, strip);
      store(sum, strip);
      ++strip;
    } while (launch_.split_strips && strip * blocks_ < shared_.last);
  }

 private:
  static __device__ __forceinline__ int32_t lane_idx() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int32_t warp_idx() { return threadIdx.x / 32; }

  // A part of a block: at most kStep entries.
  struct Step {
    int32_t begin;
    int32_t count;
    int32_t block;  // within its strip
    bool first;     // of its block
    bool last;
  };

  struct Entries {
    uint4 codes[kChunks];
    uint4 values[kChunks];
    int32_t count;
  };

  struct XFragments {
    uint4 part[kColTiles][2];
  };

  // This warp's blocks of a run, the empty ones left out, 32 pointers at a time.
  struct Walk {
    const SpmmProblem& problem;
    int32_t strip;
    int32_t stride;  // from a block of this warp to its next
    int32_t at;      // within the strip, of lane 0's next pointer
    int32_t last;
    int32_t base = 0;  // within the strip, of lane 0's current pointer
    int32_t begin = 0, end = 0;
    unsigned pending = 0;
    int32_t offset = 0;

    __device__ __forceinline__ Walk(const SpmmProblem& problem, int32_t strip, int32_t first, int32_t last,
                                    int32_t rank, int32_t cluster)
        : problem(problem),
          strip(strip),
          stride(kWarps * cluster),
          at(first + rank * kWarps + warp_idx()),
          last(last) {}

    __device__ __forceinline__ void read() {
      const int32_t in_block = at + stride * lane_idx();
      begin = end = 0;
      if (in_block < last) {
        const int32_t block = kTransposed ? in_block * problem.w.kb + strip : strip * problem.w.kb + in_block;
        begin = problem.w.blk_ptr[block];
        end = problem.w.blk_ptr[block + 1] - problem.w.blk_pad[block];
      }
    }

    __device__ __forceinline__ bool next(Step& step) {
      while (pending == 0) {
        if (at >= last) return false;
        base = at;
        read();
        pending = __ballot_sync(kFullWarp, begin < end);
        at += 32 * stride;
      }
      const int source = __ffs(static_cast<int>(pending)) - 1;
      step.begin = __shfl_sync(kFullWarp, begin, source) + offset;
      const int32_t rest = __shfl_sync(kFullWarp, end, source) - step.begin;
      step.block = base + stride * source;
      step.first = offset == 0;
      step.last = rest <= kStep;
      step.count = min_of(rest, kStep);
      offset += kStep;
      if (step.last) {
        pending &= pending - 1;
        offset = 0;
      }
      return true;
    }
  };

  __device__ __forceinline__ void add_blocks(float (&sum)[4][kColTiles][4], int32_t strip) {
    const int32_t strip_begin = strip * blocks_;
    Walk walk(problem_, strip, max_of(0, shared_.first - strip_begin), min_of(blocks_, shared_.last - strip_begin),
              shared_.rank, launch_.cluster);
    Step step;
    bool more = walk.next(step);
    Entries entries;
    XFragments x;
    if (more) {
      load(entries, step);
      load_x(x, step.block);
    }
    while (more) {
      Step next;
      Entries next_entries;
      XFragments next_x = x;
      more = walk.next(next);
      if (more) {
        load(next_entries, next);
        if (next.first) load_x(next_x, next.block);
      }
      send_padding_behind(entries);
      scatter(entries);
      if (step.last) {
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
      step = next;
      entries = next_entries;
      x = next_x;
    }
  }

  // Chunk c of lane l holds entries 8 (32 c + l) ... + 7 of the step.
  __device__ __forceinline__ void load(Entries& entries, const Step& step) const {
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
    const int32_t feature = 64 * block + 8 * (lane_idx() % 4);
    const int32_t features = problem_.in_features();
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      const int32_t column = 8 * j + lane_idx() / 4;
      const uint16_t* data = static_cast<const uint16_t*>(problem_.x.data) + feature;
      const bool inside = column < problem_.x.columns;
      if (inside) data += column * problem_.x.stride[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x.part[j][h] = {0, 0, 0, 0};
        if (inside && feature + 32 * h < features) {
          x.part[j][h] = *reinterpret_cast<const uint4*>(data + 32 * h);
        }
      }
    }
  }

  static __device__ __forceinline__ int32_t out_row(int32_t g) { return kTransposed ? g : g / 2 + g % 2 * 4; }

  __device__ __forceinline__ void multiply(float (&sum)[4][kColTiles][4], const XFragments& x) const {
    if constexpr (kTransposed) {
      multiply_columns(sum, x);
    } else {
      multiply_rows(sum, x);
    }
  }

  // A is the tile. One 16-byte load brings eight input features of an output feature, those that the
  // lane's x.part[h] holds. Row g of a fragment is row out_row(g) of the tile, so that the eight lanes that
  // read together find eight different 16-byte columns.
  __device__ __forceinline__ void multiply_rows(float (&sum)[4][kColTiles][4], const XFragments& x) const {
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
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) {
          multiply_add<Scalar>(sum[i][j], first, x.part[j][h].x, x.part[j][h].y);
          multiply_add<Scalar>(sum[i][j], second, x.part[j][h].z, x.part[j][h].w);
        }
      }
    }
  }

  // A is the tile's transpose. The eight rows of an 8 x 8 matrix must lie in different 16-byte columns of
  // the swizzled tile, so matrix q takes pair (q + t) % 4 of lane t's eight features.
  __device__ __forceinline__ void multiply_columns(float (&sum)[4][kColTiles][4], const XFragments& x) const {
    const int32_t matrix = lane_idx() / 8, t = lane_idx() % 8 / 2, odd = lane_idx() % 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t part[kColTiles][4];
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) rotate(part[j], x.part[j][h], lane_idx() % 4);
#pragma unroll
      for (int q = 0; q < 4; q += 2) {
        const int32_t row_in_group = 2 * ((q + matrix / 2 + t) % 4) + odd;
        const int32_t row = 8 * (t + 4 * h) + row_in_group;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t a[4];
          load_matrices<true>(a, tile_ + row * 64 + (((2 * i + matrix % 2) ^ row_in_group) * 8));
#pragma unroll
          for (int j = 0; j < kColTiles; ++j) multiply_add<Scalar>(sum[i][j], a, part[j][q], part[j][q + 1]);
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

  // Adds up the four warps' sums and hands them over. The tiles lend their memory and are zero again.
  __device__ __forceinline__ void store(const float (&sum)[4][kColTiles][4], int32_t strip) {
    const bool whole = shared_.first <= strip * blocks_ && strip * blocks_ + blocks_ <= shared_.last;
    const int32_t g = out_row(lane_idx() / 4), t = lane_idx() % 4;
    float* out = reinterpret_cast<float*>(tile_);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[(8 * j + 2 * t + e % 2) * 64 + 16 * i + 8 * (e / 2) + g] = sum[i][j][e];
    __syncthreads();
    const int32_t columns = static_cast<int32_t>(problem_.y.columns);
    const int32_t row = threadIdx.x % 64, feature = strip * 64 + row;
    float* first_warp = reinterpret_cast<float*>(shared_.tile[0]);
#pragma unroll 2
    for (int32_t column = threadIdx.x / 64; column < columns; column += kThreads / 64) {
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp)
        total += reinterpret_cast<const float*>(shared_.tile[warp])[column * 64 + row];
      if (launch_.cluster > 1) {
        first_warp[column * 64 + row] = total;
      } else if (whole) {
        write(feature, column, total);
      } else {
        static_cast<float*>(problem_.partials)[(int64_t(shared_.item + strip) * 64 + row) * columns + column] = total;
      }
    }
    if (launch_.cluster > 1) {
      cluster_sync();
      for (int32_t column = threadIdx.x / 64 + kThreads / 64 * shared_.rank; column < columns;
           column += kThreads / 64 * launch_.cluster) {
        float total = 0;
        for (int32_t rank = 0; rank < launch_.cluster; ++rank) {
          total += read_neighbour(&first_warp[column * 64 + row], rank);
        }
        write(feature, column, total);
      }
      cluster_sync();
    }
    __syncthreads();
    clear_tile();
  }

  __device__ __forceinline__ void write(int32_t feature, int32_t column, float total) const {
    if (feature >= problem_.out_features()) return;
    const Epilogue<Scalar> epilogue = epilogue_of<Scalar>(problem_);
    static_cast<Scalar*>(problem_.y.data)[feature * problem_.y.stride_f + column * problem_.y.stride[2]] =
        epilogue.finish(total, epilogue.bias_of(feature));
  }

  const SpmmProblem& problem_;
  const NarrowLaunch& launch_;
  Shared& shared_;
  uint16_t* tile_;
  int32_t blocks_;
};

// grid.x = units or strips.
template <typename Scalar, bool kTransposed, int kTileN>
__global__ void __launch_bounds__(Narrow<Scalar, kTransposed, kTileN>::kThreads,
                                  Narrow<Scalar, kTransposed, kTileN>::kThreadBlocks)
    narrow_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ NarrowLaunch launch) {
  using Kernel = Narrow<Scalar, kTransposed, kTileN>;
  extern __shared__ __align__(128) unsigned char shared[];
  Kernel(problem, launch, *reinterpret_cast<typename Kernel::Shared*>(shared)).run();
}

}  // namespace csb::cuda
