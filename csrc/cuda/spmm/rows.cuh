#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/device/mbarrier.cuh"
#include "cuda/spmm/rows_walk.cuh"

namespace csb::cuda {

// What the launcher decides for every thread block of a launch.
struct RowsLaunch {
  bool split;              // a thread block walks a unit, else kStrips strips
  bool lanes_on_features;  // with kElements: neighbouring lanes read neighbouring features, else columns
  bool vector_entries;     // codes and values can be read in vectors
  bool vector_output;      // 16 bytes of neighbouring features of Y are one aligned vector
};

template <int kStages>
struct RingCursor {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// Fills the stages with X.
template <typename Config, RowsAccess kAccess, bool kTransposed>
class RowsLoader {
 public:
  using T = typename Config::T;
  using Acc = AccOf<T>;
  using Shared = RowsShared<Config>;
  using Stage = RowsStage<Config>;
  static constexpr int kLoaders = Config::kLoaders;
  static constexpr int kBatch = Config::kBatch;

  __device__ __forceinline__ RowsLoader(const SpmmProblem& problem, const RowsLaunch& how, Shared& shared, int warp_idx)
      : problem_(problem), how_(how), shared_(shared), warp_idx_(warp_idx) {
    lane_idx_ = threadIdx.x % 32;
  }

  __device__ __forceinline__ void run() {
    RowsWalk<Config, kTransposed> walk(problem_, how_.split, 0);
    RowsStep step = walk.next();
    first_column_ = -1;
    while (true) {
      if (step.kind != RowsStepKind::kEnd && step.first_column != first_column_) enter_tile(step.first_column);
      XVector x[kBatch];
      const bool multiply = step.kind == RowsStepKind::kMultiply;
      if (kVectors && multiply) fetch(x, step.at * Config::kBlock, 0);  // under the wait for a free stage
      mbarrier_wait(&shared_.empty[cursor_.slot], cursor_.phase ^ 1);
      Stage& stage = shared_.stages[cursor_.slot];
      if (warp_idx_ == 0 && lane_idx_ == 0) {
        stage.kind = step.kind;
        stage.strip = step.strip;
        stage.first_column = step.first_column;
      }
      if constexpr (kVectors) {
        if (multiply) {
          put(stage, x, 0);
#pragma unroll 1
          for (int first = kBatch; first < Config::kItems; first += kBatch) {
            fetch(x, step.at * Config::kBlock, first);
            put(stage, x, first);
          }
        }
      } else {
        if (multiply) copy(stage, step.at * Config::kBlock);
        mbarrier_arrive_after_copies(&shared_.full[cursor_.slot]);
      }
      __syncwarp();
      if (lane_idx_ == 0) mbarrier_arrive(&shared_.full[cursor_.slot]);
      cursor_.advance();
      if (step.kind == RowsStepKind::kEnd) return;
      step = walk.next();
    }
  }

 private:
  using XVector = Vector<T, 4>;
  static constexpr bool kVectors = kAccess != RowsAccess::kElements;

  __device__ __forceinline__ void enter_tile(int64_t first_column) {
    first_column_ = first_column;
    columns_ = static_cast<int>(min_of<int64_t>(Config::kTileN, problem_.x.columns - first_column));
    if constexpr (kAccess != RowsAccess::kFeatureVectors) {
      synchronize();  // the offsets of the tile before this one are no longer read
      for (int j = 32 * warp_idx_ + lane_idx_; j < columns_; j += 32 * kLoaders) {
        shared_.x_offsets[j] = problem_.x.column_offset(first_column + j);
      }
      synchronize();
    }
  }

  __device__ __forceinline__ void synchronize() const { asm volatile("bar.sync 1, %0;" ::"n"(32 * kLoaders) : "memory"); }

  // An item of X: 32 x 4 elements, a vector for every lane. Vectors lie along features or columns; eight lanes follow
  // them, four rows of lanes the other way. The stage's pitch puts what they store into different banks.
  //
  //   kFeatureVectors            kColumnVectors
  //   item = 4 columns           item = 4 features
  //        x 32 features              x 32 columns
  static constexpr int kGroupItems = 16 / kLoaders;  // a warp's items in 32 columns
  static_assert(kLoaders % 2 == 0 && 16 % kLoaders == 0, "a warp stays in one half of the features");

  __device__ __forceinline__ int along() const { return 4 * (lane_idx_ % 8); }
  __device__ __forceinline__ int across() const { return lane_idx_ / 8; }

  __device__ __forceinline__ void fetch(XVector (&x)[kBatch], int32_t in_begin, int first) const {
    const int32_t features = (kTransposed ? problem_.w.m : problem_.w.k) - in_begin;
    const T* data = static_cast<const T*>(problem_.x.data) + in_begin * problem_.x.stride_f;
    if constexpr (kAccess == RowsAccess::kFeatureVectors) {
      const int feature = 32 * (warp_idx_ % 2) + along();
      const int column = 4 * (first * kLoaders / 2 + warp_idx_ / 2) + across();
      const int last = feature < features ? columns_ : 0;
      const T* from = data + feature + (first_column_ + column) * problem_.x.stride[2];
      int64_t step = 2 * kLoaders * problem_.x.stride[2];
      asm volatile("" : "+l"(step));  // opaque, or its multiples are kept in registers, and spill
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (column + 2 * kLoaders * i < last) x[i] = load_x(from);
        from += step;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = (first + i) / kGroupItems * 32 + along();
        const int feature = 4 * ((first + i) % kGroupItems * kLoaders + warp_idx_) + across();
        if (column >= columns_ || feature >= features) continue;
        x[i] = load_x(data + feature * problem_.x.stride_f + shared_.x_offsets[column]);
      }
    }
  }

  static __device__ __forceinline__ XVector load_x(const T* from) {
    XVector x = {};
    if constexpr (sizeof(T) == 4) {
      asm volatile("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x.lane[0]), "=f"(x.lane[1]), "=f"(x.lane[2]), "=f"(x.lane[3])
                   : "l"(from));
    }
    return x;
  }

  __device__ __forceinline__ void put(Stage& stage, const XVector (&x)[kBatch], int first) const {
    if constexpr (kAccess == RowsAccess::kFeatureVectors) {
      const int column = 4 * (first * kLoaders / 2 + warp_idx_ / 2) + across();
      Acc* to = stage.x + column * Config::kPitch + 32 * (warp_idx_ % 2) + along();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int v = 0; v < 4; ++v) to[2 * kLoaders * i * Config::kPitch + v] = x[i].lane[v];
      }
    } else {
      Acc* to = stage.x + along() * Config::kPitch + 4 * warp_idx_ + across();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = (first + i) / kGroupItems * 32 * Config::kPitch + (first + i) % kGroupItems * 4 * kLoaders;
#pragma unroll
        for (int v = 0; v < 4; ++v) to[at + v * Config::kPitch] = x[i].lane[v];
      }
    }
  }

  // X element by element, where it has no vectors.
  __device__ __forceinline__ void copy(Stage& stage, int32_t in_begin) {
    const int32_t in_features = kTransposed ? problem_.w.m : problem_.w.k;
    const int features = min_of(Config::kBlock, in_features - in_begin);
    const T* x = static_cast<const T*>(problem_.x.data) + in_begin * problem_.x.stride_f;
    const bool along_features = how_.lanes_on_features;
    const int runs = along_features ? columns_ : features;
    const int length = along_features ? features : columns_;
#pragma unroll 1
    for (int along = lane_idx_; along < length; along += 32) {
#pragma unroll 4
      for (int run = warp_idx_; run < runs; run += kLoaders) {
        const int f = along_features ? along : run;
        const int j = along_features ? run : along;
        copy_element_async(&stage.x[j * Config::kPitch + f], x + f * problem_.x.stride_f + shared_.x_offsets[j]);
      }
    }
  }

  const SpmmProblem& problem_;
  const RowsLaunch& how_;
  Shared& shared_;
  int warp_idx_;
  int lane_idx_;
  int64_t first_column_;
  int columns_;
  RingCursor<Config::kStages> cursor_;
};

// Fills every kTurns-th stage with the entries of one strip, in the order of the output features.
template <typename Config, bool kTransposed>
class RowsSorter {
 public:
  using T = typename Config::T;
  using Acc = AccOf<T>;
  using Shared = RowsShared<Config>;
  using Stage = RowsStage<Config>;
  static constexpr int kRun = Config::kRun;

  __device__ __forceinline__ RowsSorter(const SpmmProblem& problem, const RowsLaunch& how, Shared& shared, int warp_idx)
      : problem_(problem), how_(how), shared_(shared), warp_idx_(warp_idx), strip_(warp_idx % Config::kStrips) {
    lane_idx_ = threadIdx.x % 32;
  }

  __device__ __forceinline__ void run() {
    RowsWalk<Config, kTransposed> walk(problem_, how_.split, strip_);
    const int turn = warp_idx_ / Config::kStrips;
    Work work;
    if (!find_work(walk, turn, work)) return;
    while (true) {
      Work next;
      // Its loads run while this one is sorted.
      const bool more = work.kind != RowsStepKind::kEnd && find_work(walk, Config::kTurns - 1, next);
      for (int i = 0; i < work.skipped; ++i) cursor_.advance();
      mbarrier_wait(&shared_.empty[cursor_.slot], cursor_.phase ^ 1);
      Stage& stage = shared_.stages[cursor_.slot];
      if (work.kind == RowsStepKind::kMultiply) {
        if constexpr (kTransposed) {
          sort(stage, work);
        } else {
          keep_order(stage, work);
        }
      }
      __syncwarp();
      if (lane_idx_ == 0) mbarrier_arrive(&shared_.full[cursor_.slot]);
      cursor_.advance();
      if (!more) return;
      work = next;
    }
  }

 private:
  // kRun neighbouring entries of a lane.
  struct Run {
    uint32_t codes[kRun / 2];  // two in a register
    T value[kRun];
    int32_t previous;  // code in front of the warp's first entry, for its first lane

    __device__ __forceinline__ int32_t code(int i) const { return codes[i / 2] >> 16 * (i % 2) & 0xffff; }
  };

  struct Work {
    RowsStepKind kind;
    int skipped;  // stages of other sorters in front of it
    int32_t window;
    int32_t begin;
    int32_t count;
    Run run;
  };

  // Passes over `skip` steps; false when the walk ends in one of them.
  __device__ __forceinline__ bool find_work(RowsWalk<Config, kTransposed>& walk, int skip, Work& work) const {
    RowsStep step = walk.next();
    for (int i = 0; i < skip; ++i) {
      if (step.kind == RowsStepKind::kEnd) return false;
      step = walk.next();
    }
    work.kind = step.kind;
    work.skipped = skip;
    work.window = step.window;
    work.begin = walk.begin();
    work.count = step.kind == RowsStepKind::kMultiply ? walk.count() : 0;
    work.run = load(work, 0);
    return true;
  }

  // An entry past the end has any code.
  __device__ __forceinline__ Run load(const Work& work, int32_t pass) const {
    Run run = {};
    const int32_t entry = pass * Config::kPass + kRun * lane_idx_;
    if (entry >= work.count) return run;
    const uint16_t* codes = problem_.w.codes + work.begin + entry;
    const T* values = static_cast<const T*>(problem_.values) + work.begin + entry;
    if (how_.vector_entries) {  // a block is padded to whole vectors
      const auto code = *reinterpret_cast<const Vector<uint32_t, kRun / 2>*>(codes);
      constexpr int kVec = min_of<int>(kRun, 16 / sizeof(T));
#pragma unroll
      for (int i = 0; i < kRun / 2; ++i) run.codes[i] = code.lane[i];
#pragma unroll
      for (int i = 0; i < kRun; i += kVec) {
        const auto value = *reinterpret_cast<const Vector<T, kVec>*>(values + i);
#pragma unroll
        for (int v = 0; v < kVec; ++v) run.value[i + v] = value.lane[v];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (entry + i >= work.count) continue;
        run.codes[i / 2] |= uint32_t(codes[i]) << 16 * (i % 2);
        run.value[i] = values[i];
      }
    }
    if (!kTransposed && lane_idx_ == 0) run.previous = entry > 0 ? codes[-1] : -1;
    return run;
  }

  // Calls body(run, first entry) for all of a lane's runs, each read while the one before it is used.
  template <typename Body>
  __device__ __forceinline__ void for_each_run(const Work& work, Body&& body) const {
    const int32_t passes = ceil_div(work.count, Config::kPass);
    Run run = work.run;
#pragma unroll 1
    for (int32_t pass = 0; pass < passes; ++pass) {
      const Run next = load(work, pass + 1);
      body(run, pass * Config::kPass + kRun * lane_idx_);
      run = next;
    }
  }

  static __device__ __forceinline__ int32_t clip(int32_t place) {
    return max_of(0, min_of<int32_t>(place, Config::kCapacity));
  }

  // Entries come by row, as the output features of W . X do.
  __device__ __forceinline__ void keep_order(Stage& stage, const Work& work) {
    uint16_t* begin = stage.begin[strip_];
    if (work.count == 0) {
      for (int row = lane_idx_; row <= Config::kBlock; row += 32) begin[row] = 0;
    }
    for_each_run(work, [&](const Run& run, int32_t first) {
      int32_t row = __shfl_up_sync(kFullWarp, run.code(kRun - 1) >> 6, 1);
      if (lane_idx_ == 0) row = run.previous >> 6;  // -1 stays -1
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int32_t entry = first + i;
        if (entry >= work.count) break;
        const int32_t code = run.code(i);
#pragma unroll 1
        for (; row < code >> 6; ++row) begin[row + 1] = clip(entry - work.window);
        if (entry == work.count - 1) {
#pragma unroll 1
          for (; row < Config::kBlock; ++row) begin[row + 1] = clip(work.count - work.window);
        }
        place(stage, entry - work.window, run.value[i], code_col(code, 6));
      }
    });
  }

  __device__ __forceinline__ void place(Stage& stage, int32_t place, T value, int32_t in) {
    if (place < 0 || place >= Config::kCapacity) return;
    stage.entries[strip_][place] = {value, in * static_cast<int32_t>(sizeof(Acc))};
  }

  // Output features are columns of W: a bit per entry in a mask per column, set by integer atomics; an entry's place is
  // the popcount in front of its bit, whatever order the lanes ran in.
  __device__ __forceinline__ void sort(Stage& stage, const Work& work) {
    uint32_t* masks = shared_.masks[warp_idx_];
    *reinterpret_cast<uint4*>(masks + 4 * lane_idx_) = uint4{0, 0, 0, 0};
    __syncwarp();
    for_each_run(work, [&](const Run& run, int32_t first) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (first + i >= work.count) break;
        const int32_t row = run.code(i) >> 6;
        atomicOr(&masks[2 * code_col(run.code(i), 6) + (row >> 5)], 1u << (row & 31));
      }
    });
    __syncwarp();
    find_starts(stage, masks, work.window);
    __syncwarp();
    const int32_t* starts = shared_.starts[warp_idx_];
    for_each_run(work, [&](const Run& run, int32_t first) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (first + i >= work.count) break;
        const int32_t row = run.code(i) >> 6;
        const int32_t col = code_col(run.code(i), 6);
        const uint2 mask = *reinterpret_cast<const uint2*>(masks + 2 * col);
        const uint32_t below = (1u << (row & 31)) - 1;
        const int32_t before = row < 32 ? __popc(mask.x & below) : __popc(mask.x) + __popc(mask.y & below);
        place(stage, starts[col] + before - work.window, run.value[i], row);
      }
    });
    __syncwarp();
  }

  // A lane knows columns 2l and 2l + 1.
  __device__ __forceinline__ void find_starts(Stage& stage, const uint32_t* masks, int32_t window) {
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
    int32_t* starts = shared_.starts[warp_idx_];
    uint16_t* begin = stage.begin[strip_];
    starts[2 * lane_idx_] = even;
    starts[2 * lane_idx_ + 1] = even + even_count;
    begin[2 * lane_idx_] = clip(even - window);
    begin[2 * lane_idx_ + 1] = clip(even + even_count - window);
    if (lane_idx_ == 31) begin[Config::kBlock] = clip(sum - window);
  }

  const SpmmProblem& problem_;
  const RowsLaunch& how_;
  Shared& shared_;
  int warp_idx_;
  int strip_;
  int lane_idx_;
  RingCursor<Config::kStages> cursor_;
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

  __device__ __forceinline__ RowsConsumer(const SpmmProblem& problem, const RowsLaunch& how, Shared& shared,
                                          int warp_idx)
      : problem_(problem), how_(how), shared_(shared) {
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
      while (stage->kind == RowsStepKind::kMultiply) {
        multiply(*stage);
        release();
        stage = &acquire();
      }
      if (stage->kind == RowsStepKind::kEnd) return;
      const int32_t strip = stage->strip;
      const int64_t first_column = stage->first_column;
      release();
      flush(strip, first_column);
    }
  }

 private:
  using Entry = RowsEntry<Acc>;

  __device__ __forceinline__ const Stage& acquire() {
    mbarrier_wait(&shared_.full[cursor_.slot], cursor_.phase);
    return shared_.stages[cursor_.slot];
  }

  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared_.empty[cursor_.slot]);
    cursor_.advance();
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
  RingCursor<Config::kStages> cursor_;
  Acc sums_[kRows][kCols];
};

// Grid: x = work unit (split) or group of kStrips output strips; y = column tiles, folded at the grid's limit.
template <typename Config, RowsAccess kAccess, bool kTransposed>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    rows_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ RowsLaunch how) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<RowsShared<Config>*>(shared_bytes);
  if (threadIdx.x < Config::kStages) {
    // Every loader and one sorter of each strip; where X is copied element by element also every copying thread.
    constexpr int kCopying = kAccess == RowsAccess::kElements ? 32 * Config::kLoaders : 0;
    mbarrier_init(&shared.full[threadIdx.x], Config::kLoaders + Config::kStrips + kCopying);
    mbarrier_init(&shared.empty[threadIdx.x], Config::kConsumers);
  }
  __syncthreads();
  // Uniform by construction, which the compiler can see only this way.
  const int warp_idx = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp_idx < Config::kConsumers) {
    RowsConsumer<Config, kTransposed>(problem, how, shared, warp_idx).run();
  } else if (warp_idx < Config::kConsumers + Config::kLoaders) {
    RowsLoader<Config, kAccess, kTransposed>(problem, how, shared, warp_idx - Config::kConsumers).run();
  } else {
    RowsSorter<Config, kTransposed>(problem, how, shared, warp_idx - Config::kConsumers - Config::kLoaders).run();
  }
}

}  // namespace csb::cuda
