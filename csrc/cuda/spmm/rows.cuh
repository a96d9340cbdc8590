#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/device/gather_walk.cuh"
#include "cuda/device/mbarrier.cuh"
#include "cuda/spmm/rows_config.cuh"

namespace csb::cuda {

// What the launcher decides for every thread block of a launch.
struct RowsLaunch {
  bool split;  // a thread block walks a unit, else kStrips strips
  bool lanes_on_features;  // with kElements: neighbouring lanes read neighbouring features, else columns
  bool vector_entries;  // codes and values can be read in vectors
  bool vector_output;   // 16 bytes of neighbouring features of Y are one aligned vector
};

// The positions of a thread block, and their strips.
template <typename Config, bool kTransposed>
struct RowsRange {
  int32_t first;
  int32_t last;
  int32_t blocks_per_strip;
  int32_t first_strip;
  int32_t last_strip;  // of the range, or of the last group of strips; may lie behind the last strip

  __device__ __forceinline__ RowsRange(const SpmmProblem& problem, const RowsLaunch& how) {
    blocks_per_strip = kTransposed ? problem.w.mb : problem.w.kb;
    const int32_t strips = kTransposed ? problem.w.kb : problem.w.mb;
    if (Config::kStrips == 1 && how.split) {
      first = problem.units[blockIdx.x];
      last = problem.units[blockIdx.x + 1];
      first_strip = first < last ? first / blocks_per_strip : 0;
      last_strip = first < last ? (last - 1) / blocks_per_strip : -1;
    } else {
      first_strip = blockIdx.x * Config::kStrips;
      last_strip = first_strip;
      first = first_strip * blocks_per_strip;
      last = min_of(first_strip + Config::kStrips, strips) * blocks_per_strip;
    }
  }
};

// Fills the ring. All producer warps make the same walk.
template <typename Config, RowsAccess kAccess, bool kTransposed>
class RowsProducer {
 public:
  using T = typename Config::T;
  using Acc = AccOf<T>;
  using Shared = RowsShared<Config>;
  using Stage = RowsStage<Config>;
  using Range = RowsRange<Config, kTransposed>;
  using XVector = Vector<T, 4>;
  static constexpr int kStrips = Config::kStrips;
  static constexpr int kRun = Config::kRun;
  static constexpr bool kVectors = kAccess != RowsAccess::kElements;

  __device__ __forceinline__ RowsProducer(const SpmmProblem& problem, const RowsLaunch& how, Shared& shared)
      : problem_(problem), how_(how), shared_(shared), range_(problem, how) {
    thread_idx_ = threadIdx.x - 32 * Config::kConsumers;
    warp_idx_ = thread_idx_ / 32;
    lane_idx_ = thread_idx_ % 32;
  }

  __device__ __forceinline__ void run() {
    const int64_t tiles = ceil_div<int64_t>(problem_.y.columns, Config::kTileN);
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
      first_column_ = tile * Config::kTileN;
      columns_ = static_cast<int>(min_of<int64_t>(Config::kTileN, problem_.x.columns - first_column_));
      synchronize();  // the offsets of the tile before this one are no longer read
      for (int j = thread_idx_; j < columns_; j += Config::kProducerThreads) {
        shared_.x_offsets[j] = problem_.x.column_offset(first_column_ + j);
      }
      synchronize();
      for (int32_t strip = range_.first_strip; strip <= range_.last_strip; strip += kStrips) {
        walk_strip(strip);
        send(RowsStep::kFlush, strip);
      }
    }
    send(RowsStep::kEnd, 0);
  }

 private:
  struct Run {
    uint16_t code[kRun];
    T value[kRun];
    int32_t previous;  // code in front of the warp's first entry, for its first lane
  };

  __device__ __forceinline__ void synchronize() const {
    asm volatile("bar.sync 1, %0;" ::"n"(Config::kProducerThreads) : "memory");
  }

  __device__ __forceinline__ Stage& acquire() {
    mbarrier_wait(&shared_.empty[slot_], phase_ ^ 1);
    return shared_.stages[slot_];
  }

  __device__ __forceinline__ void release() {
    mbarrier_arrive_after_copies(&shared_.full[slot_]);
    __syncwarp();
    if (lane_idx_ == 0) mbarrier_arrive(&shared_.full[slot_]);
    if (++slot_ == Config::kStages) {
      slot_ = 0;
      phase_ ^= 1;
    }
  }

  __device__ __forceinline__ void send(RowsStep step, int32_t strip) {
    Stage& stage = acquire();
    if (thread_idx_ == 0) {
      stage.step = step;
      stage.strip = strip;
      stage.first_column = first_column_;
    }
    release();
  }

  // The blocks of one strip, or of kStrips of them side by side. The pointers of 32 steps are read at once.
  __device__ __forceinline__ void walk_strip(int32_t strip) {
    const int32_t per_strip = range_.blocks_per_strip;
    const int32_t strip_begin = strip * per_strip;
    const int32_t first = max_of(0, range_.first - strip_begin);
    const int32_t last = min_of(per_strip, range_.last - strip_begin);
    const int32_t strips_here = min_of(kStrips, ceil_div(range_.last - strip_begin, per_strip));
    const int32_t kb = problem_.w.kb;
    for (int32_t base = first; base < last; base += 32) {
      const int32_t at = base + lane_idx_;
      int32_t begin[kStrips], count[kStrips];
      bool filled = false;
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        begin[s] = count[s] = 0;
        if (at < last && s < strips_here) {
          const int32_t block = kTransposed ? at * kb + strip + s : (strip + s) * kb + at;
          begin[s] = problem_.w.begin(block);
          count[s] = problem_.w.end(block) - begin[s];
        }
        filled = filled || count[s] > 0;
      }
      unsigned pending = __ballot_sync(kFullWarp, filled);
      // One step ahead in registers, so that its loads run under the wait for a free stage.
      while (pending != 0) {
        const int source = __ffs(pending) - 1;
        pending &= pending - 1;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          begin_[s] = __shfl_sync(kFullWarp, begin[s], source);
          count_[s] = __shfl_sync(kFullWarp, count[s], source);
          runs_[s] = load(s, 0);
        }
        add_block(base + source);
      }
    }
  }

  __device__ __forceinline__ void add_block(int32_t at) {
    int32_t largest = count_[0];
#pragma unroll
    for (int s = 1; s < kStrips; ++s) largest = max_of(largest, count_[s]);
    for (int32_t window = 0; window < largest; window += Config::kCapacity) {
      const int32_t in_begin = at * Config::kBlock;
      XVector x[Config::kBatch];
      if constexpr (kVectors) fetch_x(x, in_begin, 0);  // under the wait for a free stage
      Stage& stage = acquire();
      if (thread_idx_ == 0) stage.step = RowsStep::kMultiply;
      if constexpr (kVectors) {
        put_x(stage, x, 0);
#pragma unroll 1
        for (int first = Config::kBatch; first < Config::kItemsPerWarp; first += Config::kBatch) {
          fetch_x(x, in_begin, first);
          put_x(stage, x, first);
        }
      } else {
        copy_x(stage, in_begin);
      }
      if constexpr (kTransposed) {
        sort(stage, window);
      } else {
        keep_order(stage, window);
      }
      release();
    }
  }

  // A warp's item of X: 32 x 4 elements, a vector for every lane. Vectors lie along features or columns; eight lanes
  // follow them, four rows of lanes the other way. The stage's pitch puts what they store into different banks.
  //
  //   kFeatureVectors            kColumnVectors
  //   item = 4 columns           item = 4 features
  //        x 32 features              x 32 columns
  static constexpr int kWarps = Config::kProducers;
  static constexpr int kGroupItems = 16 / kWarps;  // a warp's items in 32 columns
  static_assert(kWarps % 2 == 0 && 16 % kWarps == 0, "a warp stays in one half of the features, or leaves columns whole");

  __device__ __forceinline__ int along() const { return 4 * (lane_idx_ % 8); }
  __device__ __forceinline__ int across() const { return lane_idx_ / 8; }

  __device__ __forceinline__ void fetch_x(XVector (&x)[Config::kBatch], int32_t in_begin, int first) const {
    const int32_t features = (kTransposed ? problem_.w.m : problem_.w.k) - in_begin;
    const T* data = static_cast<const T*>(problem_.x.data) + in_begin * problem_.x.stride_f;
    if constexpr (kAccess == RowsAccess::kFeatureVectors) {
      const int feature = 32 * (warp_idx_ % 2) + along();
      const int column = 4 * (first * kWarps / 2 + warp_idx_ / 2) + across();
      const int last = feature < features ? columns_ : 0;
      const T* from = data + feature + (first_column_ + column) * problem_.x.stride[2];
#pragma unroll
      for (int i = 0; i < Config::kBatch; ++i) {
        if (column + 2 * kWarps * i < last) x[i] = *reinterpret_cast<const XVector*>(from);
        from += 2 * kWarps * problem_.x.stride[2];
      }
    } else {
#pragma unroll
      for (int i = 0; i < Config::kBatch; ++i) {
        const int column = (first + i) / kGroupItems * 32 + along();
        const int feature = 4 * ((first + i) % kGroupItems * kWarps + warp_idx_) + across();
        if (column >= columns_ || feature >= features) continue;
        x[i] = *reinterpret_cast<const XVector*>(data + feature * problem_.x.stride_f + shared_.x_offsets[column]);
      }
    }
  }

  __device__ __forceinline__ void put_x(Stage& stage, const XVector (&x)[Config::kBatch], int first) const {
    if constexpr (kAccess == RowsAccess::kFeatureVectors) {
      const int column = 4 * (first * kWarps / 2 + warp_idx_ / 2) + across();
      Acc* to = stage.x + column * Config::kPitch + 32 * (warp_idx_ % 2) + along();
#pragma unroll
      for (int i = 0; i < Config::kBatch; ++i) {
#pragma unroll
        for (int v = 0; v < 4; ++v) to[2 * kWarps * i * Config::kPitch + v] = x[i].lane[v];
      }
    } else {
      Acc* to = stage.x + along() * Config::kPitch + 4 * warp_idx_ + across();
#pragma unroll
      for (int i = 0; i < Config::kBatch; ++i) {
        const int at = (first + i) / kGroupItems * 32 * Config::kPitch + (first + i) % kGroupItems * 4 * kWarps;
#pragma unroll
        for (int v = 0; v < 4; ++v) to[at + v * Config::kPitch] = x[i].lane[v];
      }
    }
  }

  // X element by element, where it has no vectors.
  __device__ __forceinline__ void copy_x(Stage& stage, int32_t in_begin) {
    const int32_t in_features = kTransposed ? problem_.w.m : problem_.w.k;
    const int features = min_of(Config::kBlock, in_features - in_begin);
    const T* x = static_cast<const T*>(problem_.x.data) + in_begin * problem_.x.stride_f;
    const bool along_features = how_.lanes_on_features;
    const int runs = along_features ? columns_ : features;
    const int length = along_features ? features : columns_;
#pragma unroll 1
    for (int along = lane_idx_; along < length; along += 32) {
#pragma unroll 4
      for (int run = warp_idx_; run < runs; run += Config::kProducers) {
        const int f = along_features ? along : run;
        const int j = along_features ? run : along;
        copy_element_async(&stage.x[j * Config::kPitch + f], x + f * problem_.x.stride_f + shared_.x_offsets[j]);
      }
    }
  }

  // A thread's entries of pass `pass`; an entry past the end has any code.
  __device__ __forceinline__ Run load(int s, int32_t pass) const {
    Run run = {};
    const int32_t entry = pass * Config::kPass + kRun * thread_idx_;
    if (entry >= count_[s]) return run;
    const uint16_t* codes = problem_.w.codes + begin_[s] + entry;
    const T* values = static_cast<const T*>(problem_.values) + begin_[s] + entry;
    if (how_.vector_entries) {  // a block is padded to whole vectors
      const auto code = *reinterpret_cast<const Vector<uint16_t, kRun>*>(codes);
      constexpr int kVec = min_of<int>(kRun, 16 / sizeof(T));
#pragma unroll
      for (int i = 0; i < kRun; ++i) run.code[i] = code.lane[i];
#pragma unroll
      for (int i = 0; i < kRun; i += kVec) {
        const auto value = *reinterpret_cast<const Vector<T, kVec>*>(values + i);
#pragma unroll
        for (int v = 0; v < kVec; ++v) run.value[i + v] = value.lane[v];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (entry + i >= count_[s]) continue;
        run.code[i] = codes[i];
        run.value[i] = values[i];
      }
    }
    run.previous = -1;
    if (!kTransposed && lane_idx_ == 0 && entry > 0) run.previous = codes[-1];
    return run;
  }

  template <typename Body>
  __device__ __forceinline__ void for_each_run(int s, Body&& body) const {
    const int32_t passes = ceil_div(count_[s], Config::kPass);
    Run run = runs_[s];
#pragma unroll 1
    for (int32_t pass = 0; pass < passes; ++pass) {
      if (pass > 0) run = load(s, pass);
      body(run, pass * Config::kPass + kRun * thread_idx_);
    }
  }

  static __device__ __forceinline__ int32_t clip(int32_t place) {
    return max_of(0, min_of<int32_t>(place, Config::kCapacity));
  }

  // Entries come by row, as the output features of W . X do.
  __device__ __forceinline__ void keep_order(Stage& stage, int32_t window) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      uint16_t* begin = stage.begin[s];
      if (count_[s] == 0) {
        for (int row = thread_idx_; row <= Config::kBlock; row += Config::kProducerThreads) begin[row] = 0;
      }
      for_each_run(s, [&](const Run& run, int32_t first) {
        const int32_t last_row = run.code[kRun - 1] >> 6;
        int32_t row = __shfl_up_sync(kFullWarp, last_row, 1);
        if (lane_idx_ == 0) row = run.previous < 0 ? -1 : run.previous >> 6;
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int32_t entry = first + i;
          if (entry >= count_[s]) break;
          const int32_t code = run.code[i];
#pragma unroll 1
          for (; row < code >> 6; ++row) begin[row + 1] = clip(entry - window);
          if (entry == count_[s] - 1) {
#pragma unroll 1
            for (; row < Config::kBlock; ++row) begin[row + 1] = clip(count_[s] - window);
          }
          const int32_t place = entry - window;
          if (place >= 0 && place < Config::kCapacity) {
            stage.entries[s][place] = {run.value[i], code_col(code, 6) * int32_t(sizeof(Acc))};
          }
        }
      });
    }
  }

  // Output features are columns of W: a bit per entry in a mask per column, set by integer atomics; an entry's place is
  // the popcount in front of its bit, whatever order the threads ran in.
  __device__ __forceinline__ void sort(Stage& stage, int32_t window) {
    uint32_t(&masks)[kStrips][2 * Config::kBlock] = shared_.masks[mask_];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      for_each_run(s, [&](const Run& run, int32_t first) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (first + i >= count_[s]) break;
          const int32_t row = run.code[i] >> 6;
          atomicOr(&masks[s][2 * code_col(run.code[i], 6) + (row >> 5)], 1u << (row & 31));
        }
      });
    }
    synchronize();
    mask_ ^= 1;
    for (int i = thread_idx_; i < kStrips * 2 * Config::kBlock; i += Config::kProducerThreads) {
      shared_.masks[mask_][0][i] = 0;
    }
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      if (s % Config::kProducers == warp_idx_) find_starts(stage, s, masks[s], window);
    }
    synchronize();
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      for_each_run(s, [&](const Run& run, int32_t first) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (first + i >= count_[s]) break;
          const int32_t row = run.code[i] >> 6;
          const int32_t col = code_col(run.code[i], 6);
          const uint2 mask = *reinterpret_cast<const uint2*>(&masks[s][2 * col]);
          const uint32_t below = (1u << (row & 31)) - 1;
          const int32_t before = row < 32 ? __popc(mask.x & below) : __popc(mask.x) + __popc(mask.y & below);
          const int32_t place = shared_.starts[s][col] + before - window;
          if (place >= 0 && place < Config::kCapacity) {
            stage.entries[s][place] = {run.value[i], row * int32_t(sizeof(Acc))};
          }
        }
      });
    }
  }

  // By one warp: a lane knows columns 2l and 2l + 1.
  __device__ __forceinline__ void find_starts(Stage& stage, int s, const uint32_t* masks, int32_t window) {
    const uint4 mask = *reinterpret_cast<const uint4*>(masks + 4 * lane_idx_);
    const int32_t even_count = __popc(mask.x) + __popc(mask.y);
    const int32_t count = even_count + __popc(mask.z) + __popc(mask.w);
    int32_t sum = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(kFullWarp, sum, step);
      if (lane_idx_ >= step) sum += other;
    }
    const int32_t even = sum - count;
    shared_.starts[s][2 * lane_idx_] = even;
    shared_.starts[s][2 * lane_idx_ + 1] = even + even_count;
    stage.begin[s][2 * lane_idx_] = clip(even - window);
    stage.begin[s][2 * lane_idx_ + 1] = clip(even + even_count - window);
    if (lane_idx_ == 31) stage.begin[s][Config::kBlock] = clip(sum - window);
  }

  const SpmmProblem& problem_;
  const RowsLaunch& how_;
  Shared& shared_;
  const Range range_;
  int thread_idx_;
  int warp_idx_;
  int lane_idx_;
  int64_t first_column_;
  int columns_;
  int slot_ = 0;
  uint32_t phase_ = 0;
  int mask_ = 0;
  int32_t begin_[kStrips];
  int32_t count_[kStrips];
  Run runs_[kStrips];
};

// Multiplies what the ring brings.
template <typename Config, bool kTransposed>
class RowsConsumer {
 public:
  using T = typename Config::T;
  using Acc = AccOf<T>;
  using Shared = RowsShared<Config>;
  using Stage = RowsStage<Config>;
  static constexpr int kRows = Config::kRows;
  static constexpr int kCols = Config::kCols;

  __device__ __forceinline__ RowsConsumer(const SpmmProblem& problem, const RowsLaunch& how, Shared& shared)
      : problem_(problem), how_(how), shared_(shared) {
    // Uniform by construction, which the compiler can see only this way.
    const int warp_idx = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
    strip_ = warp_idx / Config::kWarpsPerStrip;
    first_row_ = warp_idx % Config::kWarpsPerStrip * kRows;
    lane_idx_ = threadIdx.x % 32;
  }

  __device__ __forceinline__ void run() {
    // Nested, rather than one loop over steps of all kinds, in which the sums would move from register to register.
    while (true) {
      clear();
      const Stage* stage = &acquire();
#pragma unroll 1
      while (stage->step == RowsStep::kMultiply) {
        multiply(*stage);
        release();
        stage = &acquire();
      }
      if (stage->step == RowsStep::kEnd) return;
      const int32_t strip = stage->strip;
      const int64_t first_column = stage->first_column;
      release();
      flush(strip, first_column);
    }
  }

 private:
  using Entry = RowsEntry<Acc>;

  __device__ __forceinline__ const Stage& acquire() {
    mbarrier_wait(&shared_.full[slot_], phase_);
    return shared_.stages[slot_];
  }

  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared_.empty[slot_]);
    if (++slot_ == Config::kStages) {
      slot_ = 0;
      phase_ ^= 1;
    }
  }

  __device__ __forceinline__ void multiply(const Stage& stage) {
    const char* x = reinterpret_cast<const char*>(stage.x + lane_idx_ * Config::kPitch);
    const Entry* entries = stage.entries[strip_];
    const uint16_t* begin = stage.begin[strip_] + first_row_;
    // Two in a register: the sums need most of them.
    Vector<uint16_t, min_of(kRows, 8)> places[ceil_div(kRows, 8)];
#pragma unroll
    for (int i = 0; i < ceil_div(kRows, 8); ++i) {
      places[i] = reinterpret_cast<const Vector<uint16_t, min_of(kRows, 8)>*>(begin)[i];
    }
    const int32_t last = begin[kRows];
    // A warp's entries follow each other across its rows. The next entry is read while the one before it is multiplied;
    // the last read may lie behind the last entry, but not behind the stage.
    const Entry* entry = entries + places[0].lane[0];
    Entry next = *entry;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Entry* end = entries + (r + 1 < kRows ? places[(r + 1) / 8 % ceil_div(kRows, 8)].lane[(r + 1) % min_of(kRows, 8)] : last);
      if constexpr (kCols <= 4) {
#pragma unroll 1
        for (; entry + 2 <= end; entry += 2) {
          const Entry a = next;
          const Entry b = entry[1];
          next = entry[2];
          Acc xa[kCols], xb[kCols];
          read(xa, x + a.offset);
          read(xb, x + b.offset);
          add(r, a.value, xa);
          add(r, b.value, xb);
        }
        if (entry == end) continue;
      }
#pragma unroll 1
      for (; entry < end; ++entry) {
        const Entry a = next;
        next = entry[1];
        Acc xa[kCols];
        read(xa, x + a.offset);
        add(r, a.value, xa);
        if (kCols <= 4) {
          ++entry;
          break;
        }
      }
    }
  }

  static __device__ __forceinline__ void read(Acc (&to)[kCols], const char* from) {
#pragma unroll
    for (int i = 0; i < kCols; ++i) to[i] = reinterpret_cast<const Acc*>(from)[i * 32 * Config::kPitch];
  }

  __device__ __forceinline__ void add(int r, Acc value, const Acc (&x)[kCols]) {
#pragma unroll
    for (int i = 0; i < kCols; ++i) sums_[r][i] += value * x[i];
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kCols; ++i) sums_[r][i] = Acc(0);
    }
  }

  __device__ __forceinline__ void flush(int32_t first_strip, int64_t first_column) {
    const int32_t per_strip = kTransposed ? problem_.w.mb : problem_.w.kb;
    const int32_t strip = first_strip + strip_;
    const int32_t strip_begin = strip * per_strip;
    const int32_t feature = strip * Config::kBlock + first_row_;
    const int32_t features = (kTransposed ? problem_.w.k : problem_.w.m) - feature;
    if (features <= 0) return;
    bool whole = true;
    if (Config::kStrips == 1 && how_.split) {
      whole = problem_.units[blockIdx.x] <= strip_begin && strip_begin + per_strip <= problem_.units[blockIdx.x + 1];
    }
    const Epilogue<T> epilogue = epilogue_of<T>(problem_);
    // The columns move down one register each time: with an index into them they would live in memory, and unrolled
    // the activations would be there kCols times.
#pragma unroll 1
    for (int i = 0; i < kCols; ++i) {
      const int64_t column = first_column + 32 * i + lane_idx_;
      if (column < problem_.y.columns) {
        if (whole) {
          store_output(epilogue, feature, features, column);
        } else {
          store_partial(strip, features, column);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 1; c < kCols; ++c) sums_[r][c - 1] = sums_[r][c];
      }
    }
  }

  __device__ __forceinline__ void store_output(const Epilogue<T>& epilogue, int32_t feature, int32_t features,
                                               int64_t column) {
    T* y = static_cast<T*>(problem_.y.data) + problem_.y.column_offset(column) + feature * problem_.y.stride_f;
    constexpr int kVec = 16 / sizeof(T);
#pragma unroll
    for (int r = 0; r < kRows; r += kVec) {
      Vector<T, kVec> out;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const Acc sum = sums_[r + v][0] + (r + v < features ? epilogue.bias_of(feature + r + v) : Acc(0));
        out.lane[v] = from_acc<T>(epilogue.activation == Activation::kNone ? sum : activate_apart(sum, epilogue.activation));
      }
      if (how_.vector_output && r + kVec <= features) {
        *reinterpret_cast<Vector<T, kVec>*>(y + r) = out;
        continue;
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (r + v < features) y[(r + v) * problem_.y.stride_f] = out.lane[v];
      }
    }
  }

  // Not inline: kRows copies of every activation would cost the sums their registers.
  static __device__ __noinline__ Acc activate_apart(Acc sum, Activation activation) {
    return activate(sum, activation);
  }

  __device__ __forceinline__ void store_partial(int32_t strip, int32_t features, int64_t column) {
    const int64_t slot = int64_t(blockIdx.x) + strip;
    Acc* partial = static_cast<Acc*>(problem_.partials) +
                   (slot * Config::kBlock + first_row_) * problem_.y.columns + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < features) partial[r * problem_.y.columns] = sums_[r][0];
    }
  }

  const SpmmProblem& problem_;
  const RowsLaunch& how_;
  Shared& shared_;
  int strip_;
  int first_row_;
  int lane_idx_;
  int slot_ = 0;
  uint32_t phase_ = 0;
  Acc sums_[kRows][kCols];
};

// Grid: x = work unit (split) or group of kStrips output strips; y = column tiles, folded at the grid's limit.
template <typename Config, RowsAccess kAccess, bool kTransposed>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    rows_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ RowsLaunch how) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<RowsShared<Config>*>(shared_bytes);
  for (int i = threadIdx.x; i < Config::kStrips * 2 * Config::kBlock; i += Config::kThreads) {
    shared.masks[0][0][i] = 0;
  }
  if (threadIdx.x < Config::kStages) {
    // Each producer thread arrives when its copies have landed, each producer warp when its stores are done.
    mbarrier_init(&shared.full[threadIdx.x], Config::kProducerThreads + Config::kProducers);
    mbarrier_init(&shared.empty[threadIdx.x], Config::kConsumers);
  }
  __syncthreads();
  if (threadIdx.x < 32 * Config::kConsumers) {
    RowsConsumer<Config, kTransposed>(problem, how, shared).run();
  } else {
    RowsProducer<Config, kAccess, kTransposed>(problem, how, shared).run();
  }
}

}  // namespace csb::cuda
