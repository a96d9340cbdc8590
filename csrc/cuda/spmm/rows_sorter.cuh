#pragma once

#include "cuda/spmm/rows_walk.cuh"

namespace csb::cuda {

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
    RowsWalk<Config, kTransposed> walk(problem_, how_, strip_);
    const int turn = warp_idx_ / Config::kStrips;
    Work work;
    if (!find_work(walk, turn, work)) return;
    advance(turn);
    while (true) {
      Work next;
      // Its loads run while this one is sorted.
      const bool more = work.kind != RowsStepKind::kEnd && find_work(walk, Config::kTurns - 1, next);
      mbarrier_wait(shared_address(&shared_.empty[cursor_.slot]), cursor_.parity ^ 1);
      Stage& stage = shared_.stages[cursor_.slot];
      if (work.kind == RowsStepKind::kMultiply) {
        if constexpr (kTransposed) {
          sort(stage, work);
        } else {
          keep_order(stage, work);
        }
      }
      mbarrier_arrive(shared_address(&shared_.full[cursor_.slot]));
      advance(Config::kTurns);
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
    int32_t window;
    int32_t begin;
    int32_t count;
    Run run;
  };

  __device__ __forceinline__ void advance(int stages) { cursor_.advance(stages); }

  // Passes over `skip` steps; false when the walk ends in one of them.
  __device__ __forceinline__ bool find_work(RowsWalk<Config, kTransposed>& walk, int skip, Work& work) const {
    RowsStep step = walk.next();
    for (int i = 0; i < skip; ++i) {
      if (step.kind == RowsStepKind::kEnd) return false;
      step = walk.next();
    }
    work.kind = step.kind;
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
  RingPosition<Config::kStages> cursor_;
};

}  // namespace csb::cuda
