#pragma once

#include "cuda/device/cluster.cuh"
#include "cuda/device/epilogue.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/registers.cuh"
#include "cuda/spmm/rows_loader.cuh"
#include "cuda/spmm/rows_sorter.cuh"

namespace csb::cuda {

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
  static constexpr int kMaxCluster = 8;
  static constexpr int kKept = min_of(kCols, 4);  // columns of a lane that find room in a stage together
  static_assert(Config::kConsumers * 32 * kRows * kKept <= Config::kTileN * Config::kPitch,
                "the sums fit in X's place");

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
      Stage* stage = &acquire();
#pragma unroll 1
      while (stage->kind == RowsStepKind::kMultiply) {
        multiply(*stage);
        release();
        stage = &acquire();
      }
      if (stage->kind == RowsStepKind::kEnd) return;
      if constexpr (Config::kCluster) {
        join_cluster(*stage);
      } else {
        flush(*stage);
      }
      release();
    }
  }

 private:
  using Entry = RowsEntry<Acc>;

  __device__ __forceinline__ Stage& acquire() {
    mbarrier_wait(shared_address(&shared_.full[cursor_.slot]), cursor_.parity);
    return shared_.stages[cursor_.slot];
  }

  __device__ __forceinline__ void release() {
    mbarrier_arrive(shared_address(&shared_.empty[cursor_.slot]));
    cursor_.advance(1);
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
      const Entry* end =
          entries + (r + 1 < kRows ? places[(r + 1) / 8 % ceil_div(kRows, 8)].lane[(r + 1) % min_of(kRows, 8)] : last);
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

  // By way of the stage, which holds no X in this step: what a lane stores needs registers beside the sums.
  __device__ __forceinline__ void flush(Stage& stage) {
    const int32_t per_strip = kTransposed ? problem_.w.mb : problem_.w.kb;
    const int32_t strip = stage.strip + strip_;
    const int32_t strip_begin = strip * per_strip;
    const int32_t feature = strip * Config::kBlock + first_row_;
    const int32_t features = (kTransposed ? problem_.w.k : problem_.w.m) - feature;
    if (features <= 0) return;
    bool whole = true;
    if (Config::kStrips == 1 && how_.split) {
      whole = problem_.units[blockIdx.x] <= strip_begin && strip_begin + per_strip <= problem_.units[blockIdx.x + 1];
    }
    Acc* sums = stage.x + 32 * kRows * kKept * (strip_ * Config::kWarpsPerStrip + first_row_ / kRows) + lane_idx_;
    const int64_t first_column = stage.first_column + lane_idx_;
#pragma unroll
    for (int first = 0; first < kCols; first += kKept) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[32 * (i * kRows + r)] = sums_[r][first + i];
      }
#pragma unroll 1
      for (int i = 0; i < kKept; ++i) {
        const int64_t column = first_column + 32 * (first + i);
        if (column >= problem_.y.columns) return;
        if (whole) {
          store_output(sums + 32 * kRows * i, feature, features, column);
        } else {
          store_partial(sums + 32 * kRows * i, strip, features, column);
        }
      }
    }
  }

  // Every thread block of the cluster adds up and writes its share of the columns, in the order of the thread blocks.
  __device__ __forceinline__ void join_cluster(const Stage& stage) {
    // In the same place in all of them, whatever stage each is at: the first one's X, of no use to any consumer any
    // more.
    Acc* all = shared_.stages[0].x;
    mbarrier_arrive(shared_address(&shared_.multiplied));
    mbarrier_wait(shared_address(&shared_.multiplied), 0);
    // Rows are turned by four columns each, so that lanes that read neighbouring rows meet in no bank either.
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        all[32 * (i * Config::kBlock + first_row_ + r) + (lane_idx_ + 4 * r) % 32] = sums_[r][i];
      }
    }
    __syncwarp();
    cluster_sync();
    const int32_t per_rank = Config::kTileN / how_.cluster;
    const int32_t rank = blockIdx.x % how_.cluster;
    const int32_t feature = stage.strip * Config::kBlock + first_row_ + lane_idx_ % kRows;
    const Epilogue<T> epilogue = epilogue_of<T>(problem_);
    const bool inside = feature < problem_.out_features();
    const Acc bias = inside ? epilogue.bias_of(feature) : Acc(0);
#pragma unroll 2
    for (int j = lane_idx_ / kRows; j < per_rank; j += 32 / kRows) {
      const int32_t local = rank * per_rank + j;
      const int32_t row = lane_idx_ % kRows;
      const Acc* sum = all + 32 * (local / 32 * Config::kBlock + first_row_ + row) + (local + 4 * row) % 32;
      Acc parts[kMaxCluster];
#pragma unroll
      for (int other = 0; other < kMaxCluster; ++other) {
        parts[other] = other < how_.cluster ? read_neighbour(sum, other) : Acc(0);
      }
      Acc total = 0;
#pragma unroll
      for (int other = 0; other < kMaxCluster; ++other) total += parts[other];
      const int64_t column = stage.first_column + local;
      if (!inside || column >= problem_.y.columns) continue;
      static_cast<T*>(problem_.y.data)[problem_.y.column_offset(column) + feature * problem_.y.stride_f] =
          epilogue.finish(total, bias);
    }
    __syncwarp();
    cluster_sync();  // others may still read this thread block's sums
  }

  __device__ __forceinline__ void store_output(const Acc* sums, int32_t feature, int32_t features, int64_t column) {
    const Epilogue<T> epilogue = epilogue_of<T>(problem_);
    T* y = static_cast<T*>(problem_.y.data) + problem_.y.column_offset(column) + feature * problem_.y.stride_f;
    constexpr int kVec = 16 / sizeof(T);
#pragma unroll 1
    for (int r = 0; r < kRows; r += kVec) {
      Vector<T, kVec> out;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const Acc bias = r + v < features ? epilogue.bias_of(feature + r + v) : Acc(0);
        out.lane[v] = epilogue.finish(sums[32 * (r + v)], bias);
      }
      if (how_.vector_output && r + kVec <= features) {
        *reinterpret_cast<Vector<T, kVec>*>(y) = out;
        y += kVec;
        continue;
      }
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (r + v < features) *y = out.lane[v];
        y += problem_.y.stride_f;
      }
    }
  }

  __device__ __forceinline__ void store_partial(const Acc* sums, int32_t strip, int32_t features, int64_t column) {
    const int64_t slot = int64_t(blockIdx.x) + strip;
    Acc* partial =
        static_cast<Acc*>(problem_.partials) + (slot * Config::kBlock + first_row_) * problem_.y.columns + column;
#pragma unroll 1
    for (int r = 0; r < min_of(kRows, features); ++r) {
      *partial = sums[32 * r];
      partial += problem_.y.columns;
    }
  }

  const SpmmProblem& problem_;
  const RowsLaunch& how_;
  Shared& shared_;
  int strip_;
  int first_row_;
  int lane_idx_;
  RingPosition<Config::kStages> cursor_;
  Acc sums_[kRows][kCols];
};

// Grid: x = work unit (split), group of kStrips output strips, or strip times the thread blocks of a cluster; y =
// column tiles, folded at the grid's limit.
template <typename Config, VectorAccess kAccess, bool kTransposed>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    rows_kernel(const __grid_constant__ SpmmProblem problem, const __grid_constant__ RowsLaunch how) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<RowsShared<Config>*>(shared_bytes);
  if constexpr (Config::kCluster) wait_for_previous_kernel();
  if (threadIdx.x == 0) {
    // Every thread of the loaders and of one sorter for each strip; where X is copied element by element, the loaders'
    // copies arrive too.
    constexpr int kArrivals = kAccess == VectorAccess::kNone ? 2 : 1;
    for (int i = 0; i < Config::kStages; ++i) {
      mbarrier_init(shared_address(&shared.full[i]), 32 * (kArrivals * Config::kLoaders + Config::kStrips));
      mbarrier_init(shared_address(&shared.empty[i]), 32 * Config::kConsumers);
    }
    if (Config::kCluster) mbarrier_init(shared_address(&shared.multiplied), 32 * Config::kConsumers);
  }
  __syncthreads();
  // Uniform by construction, which the compiler can see only this way.
  const int warp_idx = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp_idx < Config::kConsumers) {
    lower_registers<Config::kConsumerRegisters>();
    RowsConsumer<Config, kTransposed>(problem, how, shared, warp_idx).run();
  } else if (warp_idx < Config::kConsumers + Config::kLoaders) {
    raise_registers<Config::kLoaderRegisters>();
    RowsLoader<Config, kAccess, kTransposed>(problem, how, shared, warp_idx - Config::kConsumers).run();
  } else {
    lower_registers<Config::kSorterRegisters>();
    RowsSorter<Config, kTransposed>(problem, how, shared, warp_idx - Config::kConsumers - Config::kLoaders).run();
  }
  if (Config::kCluster && warp_idx >= Config::kConsumers) {  // the consumers meet them in join_cluster()
    mbarrier_wait(shared_address(&shared.multiplied), 0);
    __syncwarp();
    cluster_sync();
    cluster_sync();
  }
}

}  // namespace csb::cuda
