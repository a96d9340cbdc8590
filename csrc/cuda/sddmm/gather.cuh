#pragma once

#include "cuda/device/gather_walk.cuh"
#include "cuda/sddmm/gather_config.cuh"

namespace csb::cuda {

struct SddmmGatherLaunch {
  PanelAccess a_access;
  PanelAccess b_access;
};

// Grid: x = work unit; y = run of columns.
//
// For every 64 x 64 part of a block its entries are listed, at most kListed at a time; then the
// columns of the run pass by in tiles of kTileN, rows of A and columns of B in shared memory:
//
//   list entries -> | fetch tile c + 1 | products of tile c | ... -> reduce lanes -> grad_values
//
// The sum of an entry depends on the columns alone, never on where in the list it stood.
template <typename T>
class SddmmGatherBlock {
 public:
  using Config = SddmmGatherConfig<T>;
  using Shared = SddmmGatherShared<Config>;
  using FeaturePanel = typename Config::FeaturePanel;
  using Acc = typename Config::Acc;
  static constexpr int kItems = FeaturePanel::kItemsPerThread;

  __device__ __forceinline__ SddmmGatherBlock(const SddmmProblem& problem, const SddmmGatherLaunch& how, Shared& shared)
      : problem_(problem), how_(how), shared_(shared), block_shift_(problem.w.block_shift) {
    const int64_t tiles = ceil_div<int64_t>(problem.a.columns, Config::kTileN);
    const int64_t run = ceil_div<int64_t>(tiles, problem.column_splits) * Config::kTileN;
    column_begin_ = min_of(blockIdx.y * run, problem.a.columns);
    column_end_ = min_of(column_begin_ + run, problem.a.columns);
  }

  __device__ __forceinline__ void run() {
    const int32_t first = problem_.units[blockIdx.x];
    const int32_t last = problem_.units[blockIdx.x + 1];
    clear_padding(first, last);
    const int32_t subs = block_shift_ > 6 ? 1 << (block_shift_ - 6) : 1;
    GatherWalk<false> walk(problem_.w, first, last);
    while (walk.next(block_)) {
      for (int32_t sub = 0; sub < subs * subs; ++sub) {
        int32_t cursor = block_.begin;
        while (cursor < block_.end) {
          __syncthreads();  // the list before this one is no longer read
          const int count = subs == 1 ? list_run(cursor) : list_part(cursor, sub / subs, sub % subs);
          __syncthreads();
          if (count > 0) multiply(count, sub / subs, sub % subs);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void clear_padding(int32_t first, int32_t last) {
    for (int32_t block = first + static_cast<int32_t>(threadIdx.x); block < last; block += Config::kThreads) {
      for (int32_t e = problem_.w.end(block); e < problem_.w.begin(block + 1); ++e) store(e, Acc(0));
    }
  }

  __device__ __forceinline__ void store(int32_t entry, Acc sum) {
    if (problem_.column_splits > 1) {
      static_cast<Acc*>(problem_.partials)[blockIdx.y * problem_.entries + entry] = sum;
    } else {
      static_cast<T*>(problem_.grad_values)[entry] = from_acc<T>(sum);
    }
  }

  __device__ __forceinline__ void list(int at, int32_t entry, int32_t row, int32_t col) {
    shared_.places[at] = static_cast<uint32_t>(row * FeaturePanel::kPitch) << 16 | (col * FeaturePanel::kPitch);
    shared_.entries[at] = entry;
  }

  // Blocks up to 64: every entry belongs to the one part there is.
  __device__ __forceinline__ int list_run(int32_t& cursor) {
    const int count = min_of<int32_t>(block_.end - cursor, Config::kListed);
    for (int at = threadIdx.x; at < count; at += Config::kThreads) {
      const int32_t code = problem_.w.codes[cursor + at];
      list(at, cursor + at, code_row(code, block_shift_), code_col(code, block_shift_));
    }
    cursor += count;
    return count;
  }

  // Wider blocks: the entries of one part, from the cursor on, until the list might overflow.
  __device__ __forceinline__ int list_part(int32_t& cursor, int32_t row_sub, int32_t col_sub) {
    const int lane_idx = threadIdx.x % kWarpSize;
    const int warp_idx = threadIdx.x / kWarpSize;
    int count = 0;
    while (cursor < block_.end && count <= Config::kListed - Config::kThreads) {
      const int64_t entry = int64_t(cursor) + threadIdx.x;
      const int32_t code = entry < block_.end ? problem_.w.codes[entry] : 0;
      const int32_t row = code_row(code, block_shift_);
      const int32_t col = code_col(code, block_shift_);
      const bool inside = entry < block_.end && (row >> 6) == row_sub && (col >> 6) == col_sub;
      const unsigned votes = __ballot_sync(kFullWarp, inside);
      if (lane_idx == 0) shared_.warp_counts[warp_idx] = __popc(votes);
      __syncthreads();
      int at = count + __popc(votes & ((1u << lane_idx) - 1));
      for (int warp = 0; warp < Config::kWarps; ++warp) {
        if (warp < warp_idx) at += shared_.warp_counts[warp];
        count += shared_.warp_counts[warp];
      }
      if (inside) list(at, static_cast<int32_t>(entry), row & 63, col & 63);
      cursor = min_of<int64_t>(int64_t(cursor) + Config::kThreads, block_.end);
      __syncthreads();  // the counts are read before the next round writes them
    }
    return count;
  }

  __device__ __forceinline__ void multiply(int count, int32_t row_sub, int32_t col_sub) {
    const int lane = threadIdx.x % Config::kLanes;
    const int owned = ceil_div(count, Config::kGroups);
    const int first_owned = static_cast<int>(threadIdx.x) / Config::kLanes * owned;

    // Phase 1: neighbouring entries to one group, so that it reads their common row of A once.
    uint32_t places[Config::kOwned];
    Acc sums[Config::kOwned];
#pragma unroll
    for (int k = 0; k < Config::kOwned; ++k) {
      places[k] = k < owned && first_owned + k < count ? shared_.places[first_owned + k] : 0;
      sums[k] = Acc(0);
    }

    // Phase 2: the columns.
    const int64_t row_begin = (int64_t(block_.position / problem_.w.kb) << block_shift_) + row_sub * Config::kBlock;
    const int64_t col_begin = (int64_t(block_.position % problem_.w.kb) << block_shift_) + col_sub * Config::kBlock;
    find_columns(0);
    __syncthreads();
    fetch(0, row_begin, col_begin);
    const int tiles = static_cast<int>(ceil_div<int64_t>(column_end_ - column_begin_, Config::kTileN));
    for (int tile = 0; tile < tiles; ++tile) {
      __syncthreads();  // the panels are no longer read
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        FeaturePanel::put(shared_.a, a_[i], how_.a_access, i);
        FeaturePanel::put(shared_.b, b_[i], how_.b_access, i);
      }
      find_columns(tile + 1);
      __syncthreads();
      if (tile + 1 < tiles) fetch(tile + 1, row_begin, col_begin);
      add_products(places, sums, owned, lane);
    }

    // Phase 3: the lanes' shares, always in the same tree.
#pragma unroll
    for (int k = 0; k < Config::kOwned; ++k) {
      if (k >= owned) break;
      Acc sum = sums[k];
#pragma unroll
      for (int step = 1; step < Config::kLanes; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
      const bool mine = lane == k % Config::kLanes && first_owned + k < count;
      if (mine) store(shared_.entries[first_owned + k], sum);
    }
  }

  // Offsets of the columns of a tile, for the fetch that runs a tile ahead of the products.
  __device__ __forceinline__ void find_columns(int tile) {
    if (threadIdx.x >= 2 * Config::kTileN) return;
    const int j = threadIdx.x % Config::kTileN;
    const int64_t column = column_begin_ + int64_t(tile) * Config::kTileN + j;
    if (column >= column_end_) return;
    if (threadIdx.x < Config::kTileN) {
      shared_.a_offsets[tile % 2][j] = problem_.a.column_offset(column);
    } else {
      shared_.b_offsets[tile % 2][j] = problem_.b.column_offset(column);
    }
  }

  __device__ __forceinline__ void fetch(int tile, int64_t row_begin, int64_t col_begin) {
    const int64_t left = column_end_ - column_begin_ - int64_t(tile) * Config::kTileN;
    const int columns = static_cast<int>(min_of<int64_t>(Config::kTileN, left));
    const int rows = static_cast<int>(min_of<int64_t>(problem_.w.m - row_begin, 1 << block_shift_));
    const int cols = static_cast<int>(min_of<int64_t>(problem_.w.k - col_begin, 1 << block_shift_));
    const T* a = static_cast<const T*>(problem_.a.data) + row_begin * problem_.a.stride_f;
    const T* b = static_cast<const T*>(problem_.b.data) + col_begin * problem_.b.stride_f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      FeaturePanel::fetch(a_[i], a, problem_.a.stride_f, shared_.a_offsets[tile % 2], rows, columns, how_.a_access, i);
      FeaturePanel::fetch(b_[i], b, problem_.b.stride_f, shared_.b_offsets[tile % 2], cols, columns, how_.b_access, i);
    }
  }

  __device__ __forceinline__ void add_products(const uint32_t (&places)[Config::kOwned], Acc (&sums)[Config::kOwned],
                                               int owned, int lane) {
    using Row = Vector<Acc, Config::kVec>;
    const Acc* a = shared_.a + lane * Config::kVec;
    const Acc* b = shared_.b + lane * Config::kVec;
    Row a_row = *reinterpret_cast<const Row*>(a + (places[0] >> 16));
#pragma unroll
    for (int k = 0; k < Config::kOwned; ++k) {
      if (k >= owned) break;
      if (k > 0 && places[k] >> 16 != places[k > 0 ? k - 1 : 0] >> 16) {
        a_row = *reinterpret_cast<const Row*>(a + (places[k] >> 16));
      }
      const Row b_row = *reinterpret_cast<const Row*>(b + (places[k] & 0xffff));
#pragma unroll
      for (int v = 0; v < Config::kVec; ++v) sums[k] += a_row.lane[v] * b_row.lane[v];
    }
  }

  const SddmmProblem& problem_;
  const SddmmGatherLaunch& how_;
  Shared& shared_;
  int32_t block_shift_;
  int64_t column_begin_;
  int64_t column_end_;
  WalkedBlock block_;
  Acc a_[kItems][Config::kVec];
  Acc b_[kItems][Config::kVec];
};

template <typename T>
__global__ void __launch_bounds__(SddmmGatherConfig<T>::kThreads, SddmmGatherConfig<T>::kMinBlocks)
    sddmm_gather_kernel(const __grid_constant__ SddmmProblem problem, const __grid_constant__ SddmmGatherLaunch how) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using Block = SddmmGatherBlock<T>;
  Block block(problem, how, *reinterpret_cast<typename Block::Shared*>(shared_bytes));
  block.run();
}

}  // namespace csb::cuda
