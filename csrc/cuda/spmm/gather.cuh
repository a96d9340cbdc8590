#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/device/gather_walk.cuh"
#include "cuda/spmm/gather_config.cuh"

namespace csb::cuda {

// What the launcher decides for every thread block of a launch.
struct GatherLaunch {
  bool split;  // a thread block walks a unit, else a strip
  PanelAccess x_access;
  PanelAccess y_access;
};

// The 64 x 64 part of a block that a thread block works on. Blocks up to 64 have one.
struct SubTile {
  int32_t out;
  int32_t in;
};

struct TileCoord {
  int32_t out;
  int32_t in;
  bool inside;
};

// A negative code stands for no entry.
template <bool kTransposed>
__device__ __forceinline__ TileCoord locate(int32_t code, int32_t block_shift, SubTile sub) {
  const int32_t row = code_row(code, block_shift);
  const int32_t col = code_col(code, block_shift);
  const int32_t out = kTransposed ? col : row;
  const int32_t in = kTransposed ? row : col;
  return {out & 63, in & 63, code >= 0 && (out >> 6) == sub.out && (in >> 6) == sub.in};
}

// The first entries of a block, in registers since the block before it was computed.
template <typename T, int kStaged, int kThreads>
struct StagedEntries {
  int32_t codes[kStaged];
  T values[kStaged];

  __device__ __forceinline__ void load(const SpmmProblem& problem, const WalkedBlock& block) {
    const T* values_in = static_cast<const T*>(problem.values);
#pragma unroll
    for (int i = 0; i < kStaged; ++i) {
      const int64_t entry = int64_t(block.begin) + i * kThreads + threadIdx.x;
      const bool inside = entry < block.end;
      codes[i] = inside ? problem.w.codes[entry] : -1;
      values[i] = inside ? values_in[entry] : T();
    }
  }
};

// Where each output feature's entries begin in sorted order; lane l of every warp knows features
// 2l and 2l + 1.
struct RowStarts {
  int32_t even;
  int32_t odd;
  int32_t total;

  __device__ __forceinline__ explicit RowStarts(const unsigned long long* masks) {
    const int lane_idx = threadIdx.x % kWarpSize;
    const int32_t even_count = __popcll(masks[2 * lane_idx]);
    const int32_t count = even_count + __popcll(masks[2 * lane_idx + 1]);
    int32_t sum = count;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int32_t other = __shfl_up_sync(kFullWarp, sum, step);
      if (lane_idx >= step) sum += other;
    }
    even = sum - count;
    odd = even + even_count;
    total = __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  }

  // For the whole warp together; row may differ from lane to lane, 0 ... 64.
  __device__ __forceinline__ int32_t at(int32_t row) const {
    const int32_t from_even = __shfl_sync(kFullWarp, even, row >> 1);
    const int32_t from_odd = __shfl_sync(kFullWarp, odd, row >> 1);
    return row == 64 ? total : (row & 1) ? from_odd : from_even;
  }
};

// Grid: x = owner * sub-strips + sub-strip, where an owner is a work unit (split) or an output strip,
//           and a block wider than 64 has block_size / 64 sub-strips of output features;
//       y = column tiles of kTileN, folded at the grid's limit.
//
// Entries are re-sorted by output feature in shared memory, so that accumulators can stay in
// registers in both directions. The sort is a bit per entry in a mask per output feature, set by
// integer atomics; an entry's place is the popcount in front of its bit. The order of a sum is
// therefore (block, input feature), whatever order the threads ran in.
template <typename T, int kTileN, bool kTransposed>
class GatherBlock {
 public:
  using Config = GatherConfig<T, kTileN>;
  using Shared = GatherShared<Config>;
  using XPanel = typename Config::XPanel;
  using Acc = typename Config::Acc;

  __device__ __forceinline__ GatherBlock(const SpmmProblem& problem, const GatherLaunch& how, Shared& shared)
      : problem_(problem), how_(how), shared_(shared), block_shift_(problem.w.block_shift) {
    const int lane = threadIdx.x % Config::kLanes;
    split_ = threadIdx.x / Config::kLanes % Config::kSplits;
    first_row_ = threadIdx.x / (Config::kLanes * Config::kSplits) * Config::kRows;
    lane_column_ = lane * Config::kVec;
    subs_ = block_shift_ > 6 ? 1 << (block_shift_ - 6) : 1;
    const int32_t owner = blockIdx.x / subs_;
    sub_.out = blockIdx.x % subs_;
    blocks_per_strip_ = kTransposed ? problem.w.mb : problem.w.kb;
    if (how.split) {
      first_ = problem.units[owner];
      last_ = problem.units[owner + 1];
    } else {
      first_ = owner * blocks_per_strip_;
      last_ = first_ + blocks_per_strip_;
    }
  }

  __device__ __forceinline__ void run() {
    if (how_.split && first_ == last_) return;
    const int32_t first_strip = how_.split ? first_ / blocks_per_strip_ : blockIdx.x / subs_;
    const int32_t last_strip = how_.split ? (last_ - 1) / blocks_per_strip_ : first_strip;
    const int64_t tiles = ceil_div<int64_t>(problem_.y.columns, kTileN);
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
      first_column_ = tile * kTileN;
      columns_ = static_cast<int>(min_of<int64_t>(kTileN, problem_.y.columns - first_column_));
      prepare_tile();

      GatherWalk<kTransposed> walk(problem_.w, first_, last_);
      sub_.in = 0;
      bool more = walk.next(block_);
      if (more) staged_.load(problem_, block_);
      if (Config::kPrefetchX && more) fetch_x(0);

      for (int32_t strip = first_strip; strip <= last_strip; ++strip) {
        const int32_t strip_end = (strip + 1) * blocks_per_strip_;
        while (more && block_.position < strip_end) more = add_block(walk);
        flush(strip);
      }
    }
  }

 private:
  __device__ __forceinline__ void prepare_tile() {
    __syncthreads();  // the tile before this one has been drained
    for (int j = threadIdx.x; j < columns_; j += Config::kThreads) {
      shared_.x_offsets[j] = problem_.x.column_offset(first_column_ + j);
      shared_.y_offsets[j] = problem_.y.column_offset(first_column_ + j);
    }
    clear_masks();
    clear_sums();
    __syncthreads();
  }

  // One 64 x 64 step of the walk; returns whether there is another.
  __device__ __forceinline__ bool add_block(GatherWalk<kTransposed>& walk) {
    __syncthreads();  // panel and entries of the step before are no longer read
    mark_entries();
    put_x();
    __syncthreads();
    const RowStarts starts(shared_.masks);
    bool more = true;
    for (int32_t window = 0;; window += Config::kCapacity) {
      place_entries(starts, window);
      __syncthreads();
      const bool last_window = starts.total - window <= Config::kCapacity;
      if (last_window) {
        clear_masks();
        more = advance(walk);
      }
      multiply(starts, window);
      if (last_window) return more;
      __syncthreads();  // the next window overwrites the entries
    }
  }

  // Starts the loads of the next step, which then run under the products of this one.
  __device__ __forceinline__ bool advance(GatherWalk<kTransposed>& walk) {
    bool more = true;
    if (++sub_.in == subs_) {
      sub_.in = 0;
      more = walk.next(block_);
      if (more) staged_.load(problem_, block_);
    }
    if (Config::kPrefetchX && more) fetch_x(0);
    return more;
  }

  __device__ __forceinline__ void fetch_x(int first_item) {
    const int32_t in_begin = ((block_.position % blocks_per_strip_) << block_shift_) + sub_.in * Config::kBlock;
    const int32_t in_features = (kTransposed ? problem_.w.m : problem_.w.k) - in_begin;
    const T* data = static_cast<const T*>(problem_.x.data) + in_begin * problem_.x.stride_f;
#pragma unroll
    for (int i = 0; i < Config::kFetchItems; ++i) {
      XPanel::fetch(x_[i], data, problem_.x.stride_f, shared_.x_offsets, min_of(in_features, 1 << block_shift_),
                    columns_, how_.x_access, first_item + i);
    }
  }

  __device__ __forceinline__ void put_x() {
    // Rolled: unrolled, the addresses of all items would be hoisted into registers and spill.
#pragma unroll 1
    for (int first = 0; first < XPanel::kItemsPerThread; first += Config::kFetchItems) {
      if (!Config::kPrefetchX) fetch_x(first);
#pragma unroll
      for (int i = 0; i < Config::kFetchItems; ++i) XPanel::put(shared_.panel, x_[i], how_.x_access, first + i);
    }
  }

  __device__ __forceinline__ int32_t entries() const { return block_.end - block_.begin; }

  // Code of an entry that did not fit into the registers.
  __device__ __forceinline__ int32_t late_code(int32_t entry) const {
    return entry < entries() ? problem_.w.codes[int64_t(block_.begin) + entry] : -1;
  }

  __device__ __forceinline__ void mark_entries() {
#pragma unroll
    for (int i = 0; i < Config::kStaged; ++i) mark(staged_.codes[i]);
    for (int32_t base = Config::kStaged * Config::kThreads; base < entries(); base += Config::kThreads) {
      mark(late_code(base + threadIdx.x));
    }
  }

  __device__ __forceinline__ void mark(int32_t code) {
    const TileCoord at = locate<kTransposed>(code, block_shift_, sub_);
    if (!at.inside) return;
    // As 32-bit words: shared memory has no native 64-bit OR.
    unsigned* words = reinterpret_cast<unsigned*>(shared_.masks);
    atomicOr(&words[2 * at.out + (at.in >> 5)], 1u << (at.in & 31));
  }

  __device__ __forceinline__ void place_entries(const RowStarts& starts, int32_t window) {
#pragma unroll
    for (int i = 0; i < Config::kStaged; ++i) place(starts, window, staged_.codes[i], staged_.values[i]);
    const T* values = static_cast<const T*>(problem_.values);
    for (int32_t base = Config::kStaged * Config::kThreads; base < entries(); base += Config::kThreads) {
      const int32_t entry = base + threadIdx.x;
      const int32_t code = late_code(entry);
      place(starts, window, code, code < 0 ? T() : values[int64_t(block_.begin) + entry]);
    }
  }

  __device__ __forceinline__ void place(const RowStarts& starts, int32_t window, int32_t code, T value) {
    const TileCoord at = locate<kTransposed>(code, block_shift_, sub_);
    const int32_t start = starts.at(at.out);
    if (!at.inside) return;
    const unsigned long long before = shared_.masks[at.out] & ((1ull << at.in) - 1);
    const int32_t place = start + __popcll(before) - window;
    if (place >= 0 && place < Config::kCapacity) {
      shared_.entries[place] = {to_acc(value), at.in * XPanel::kPitch};
    }
  }

  __device__ __forceinline__ void multiply(const RowStarts& starts, int32_t window) {
    const Acc* x = shared_.panel + lane_column_;
    int32_t begin = clip(starts.at(first_row_) - window);
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r) {
      const int32_t end = clip(starts.at(first_row_ + r + 1) - window);
#pragma unroll 2
      for (int32_t e = begin + split_; e < end; e += Config::kSplits) {
        const GatherEntry<Acc> entry = shared_.entries[e];
        const auto row = *reinterpret_cast<const Vector<Acc, Config::kVec>*>(x + entry.x_offset);
#pragma unroll
        for (int v = 0; v < Config::kVec; ++v) sums_[r][v] += entry.value * row.lane[v];
      }
      begin = end;
    }
  }

  static __device__ __forceinline__ int32_t clip(int32_t place) {
    return max_of(0, min_of<int32_t>(place, Config::kCapacity));
  }

  // Results leave through the panel, so that Y is written along its own fast dimension.
  __device__ __forceinline__ void flush(int32_t strip) {
    __syncthreads();  // the last product has read the panel
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r) {
      Vector<Acc, Config::kVec> sum;
#pragma unroll
      for (int v = 0; v < Config::kVec; ++v) {
        sum.lane[v] = sums_[r][v];
#pragma unroll
        for (int step = Config::kLanes; step < Config::kLanes * Config::kSplits; step *= 2) {
          sum.lane[v] += __shfl_xor_sync(kFullWarp, sum.lane[v], step);
        }
      }
      Acc* to = shared_.panel + (first_row_ + r) * XPanel::kPitch + lane_column_;
      if (split_ == 0) *reinterpret_cast<Vector<Acc, Config::kVec>*>(to) = sum;
    }
    clear_sums();
    __syncthreads();

    const int32_t out_begin = (strip << block_shift_) + sub_.out * Config::kBlock;
    const int32_t out_features = (kTransposed ? problem_.w.k : problem_.w.m) - out_begin;
    const int32_t features = min_of(min_of(Config::kBlock, 1 << block_shift_), out_features);
    const int32_t strip_begin = strip * blocks_per_strip_;
    if (first_ <= strip_begin && strip_begin + blocks_per_strip_ <= last_) {
      store_output(out_begin, features);
    } else {
      store_partial(strip, features);
    }
  }

  __device__ __forceinline__ void store_output(int32_t out_begin, int32_t features) {
    const Epilogue<T> epilogue = epilogue_of<T>(problem_);
    T* y = static_cast<T*>(problem_.y.data) + out_begin * problem_.y.stride_f;
    XPanel::drain(shared_.panel, features, columns_, how_.y_access, [&](int feature, int column, Acc sum) {
      y[feature * problem_.y.stride_f + shared_.y_offsets[column]] =
          epilogue.finish(sum, epilogue.bias_of(out_begin + feature));
    });
  }

  __device__ __forceinline__ void store_partial(int32_t strip, int32_t features) {
    const int64_t slot = int64_t(blockIdx.x / subs_) + strip;  // only units leave partials
    const int64_t row = (slot << block_shift_) + sub_.out * Config::kBlock;
    Acc* partial = static_cast<Acc*>(problem_.partials) + row * problem_.y.columns + first_column_;
    XPanel::drain(shared_.panel, features, columns_, PanelAccess::kColumns,
                  [&](int feature, int column, Acc sum) { partial[feature * problem_.y.columns + column] = sum; });
  }

  __device__ __forceinline__ void clear_masks() {
    if (threadIdx.x < Config::kBlock) shared_.masks[threadIdx.x] = 0;
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r) {
#pragma unroll
      for (int v = 0; v < Config::kVec; ++v) sums_[r][v] = Acc(0);
    }
  }

  const SpmmProblem& problem_;
  const GatherLaunch& how_;
  Shared& shared_;
  int32_t block_shift_;
  int32_t blocks_per_strip_;
  int32_t subs_;
  SubTile sub_;
  int32_t first_;  // block positions of this thread block
  int32_t last_;
  int32_t first_row_;
  int split_;
  int lane_column_;
  int64_t first_column_;
  int columns_;
  WalkedBlock block_;
  StagedEntries<T, Config::kStaged, Config::kThreads> staged_;
  Acc x_[Config::kFetchItems][Config::kVec];
  Acc sums_[Config::kRows][Config::kVec];
};

template <typename T, int kTileN, bool kTransposed>
__global__ void __launch_bounds__(GatherConfig<T, kTileN>::kThreads, GatherConfig<T, kTileN>::kMinBlocks)
    gather_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ GatherLaunch how) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  using Block = GatherBlock<T, kTileN, kTransposed>;
  Block block(problem, how, *reinterpret_cast<typename Block::Shared*>(shared_bytes));
  block.run();
}

}  // namespace csb::cuda
