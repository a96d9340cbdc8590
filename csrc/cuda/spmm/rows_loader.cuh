#pragma once

#include "cuda/spmm/rows_walk.cuh"

namespace csb::cuda {

// Fills the stages with X.
template <typename Config, VectorAccess kAccess, bool kTransposed>
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
    RowsWalk<Config, kTransposed> walk(problem_, how_, 0);
    RowsStep step = walk.next();
    first_column_ = -1;
    while (true) {
      if (step.kind != RowsStepKind::kEnd && step.first_column != first_column_) enter_tile(step.first_column);
      XVector x[kBatch];
      const bool multiply = step.kind == RowsStepKind::kMultiply;
      if (kVectors && multiply) fetch(x, step.at * Config::kBlock, 0);  // under the wait for a free stage
      mbarrier_wait(shared_address(&shared_.empty[cursor_.slot]), cursor_.parity ^ 1);
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
        mbarrier_arrive_after_copies(shared_address(&shared_.full[cursor_.slot]));
      }
      mbarrier_arrive(shared_address(&shared_.full[cursor_.slot]));
      cursor_.advance(1);
      if (step.kind == RowsStepKind::kEnd) return;
      step = walk.next();
    }
  }

 private:
  using XVector = Vector<T, 4>;
  static constexpr bool kVectors = kAccess != VectorAccess::kNone;

  __device__ __forceinline__ void enter_tile(int64_t first_column) {
    first_column_ = first_column;
    columns_ = static_cast<int>(min_of<int64_t>(Config::kTileN, problem_.x.columns - first_column));
    if constexpr (kAccess != VectorAccess::kFeatures) {
      synchronize();  // the offsets of the tile before this one are no longer read
      for (int j = 32 * warp_idx_ + lane_idx_; j < columns_; j += 32 * kLoaders) {
        shared_.x_offsets[j] = problem_.x.column_offset(first_column + j);
      }
      synchronize();
    }
  }

  __device__ __forceinline__ void synchronize() const {
    asm volatile("bar.sync 1, %0;" ::"n"(32 * kLoaders) : "memory");
  }

  // An item of X: 32 x 4 elements, a vector for every lane. Vectors lie along features or columns; eight lanes follow
  // them, four rows of lanes the other way. The stage's pitch puts what they store into different banks.
  //
  //   kFeatures                  kColumns
  //   item = 4 columns           item = 4 features
  //        x 32 features              x 32 columns
  static constexpr int kGroupItems = 16 / kLoaders;  // a warp's items in 32 columns
  static_assert(kLoaders % 2 == 0 && 16 % kLoaders == 0, "a warp stays in one half of the features");
  static_assert(kBatch % kGroupItems == 0, "a batch has whole groups of columns");

  __device__ __forceinline__ int along() const { return 4 * (lane_idx_ % 8); }
  __device__ __forceinline__ int across() const { return lane_idx_ / 8; }

  __device__ __forceinline__ void fetch(XVector (&x)[kBatch], int32_t in_begin, int first) const {
    const int32_t features = (kTransposed ? problem_.w.m : problem_.w.k) - in_begin;
    const T* data = static_cast<const T*>(problem_.x.data) + in_begin * problem_.x.stride_f;
    constexpr bool kFeatures = kAccess == VectorAccess::kFeatures;
    int64_t step = kFeatures ? 2 * kLoaders * problem_.x.stride[2] : 4 * kLoaders * problem_.x.stride_f;
    asm volatile("" : "+l"(step));  // opaque, or its multiples are kept in registers, and spill
    if constexpr (kFeatures) {
      int feature = 32 * (warp_idx_ % 2) + along();
      asm volatile("" : "+r"(feature));
      const int column = 4 * (first * kLoaders / 2 + warp_idx_ / 2) + across();
      const int last = feature < features ? columns_ : 0;
      const T* from = data + feature + (first_column_ + column) * problem_.x.stride[2];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (column + 2 * kLoaders * i < last) x[i] = load_x(from);
        from += step;
      }
    } else {
      const int feature = 4 * warp_idx_ + across();
#pragma unroll
      for (int group = 0; group < kBatch / kGroupItems; ++group) {
        const int column = 32 * (first / kGroupItems + group) + along();
        const int last = column < columns_ ? features : 0;
        if (last == 0) continue;
        const T* from = data + feature * problem_.x.stride_f + shared_.x_offsets[column];
#pragma unroll
        for (int i = 0; i < kGroupItems; ++i) {
          if (feature + 4 * kLoaders * i < last) x[group * kGroupItems + i] = load_x(from);
          from += step;
        }
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
    if constexpr (kAccess == VectorAccess::kFeatures) {
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

  // One element, 4 or 8 bytes, without a register in between. No "memory" clobber: it would put every address that is
  // read from memory behind the copy before it.
  static __device__ __forceinline__ void copy_element_async(T* to, const T* from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "cp.async moves 4, 8 or 16 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(sizeof(T)));
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
  RingPosition<Config::kStages> cursor_;
};

}  // namespace csb::cuda
