#pragma once

#include "cuda/sddmm/region_passes.cuh"

namespace csb::cuda {

// A loader's share of A or B: items of 32 features x 16 columns, every fourth one of a region's. What lies outside the
// matrices is stored as zero.
class SddmmRegionItems {
 public:
  using Config = SddmmRegionConfig;
  static constexpr int kStep = Config::kItemFeatures * Config::kLoaders;  // features from item to item
  static constexpr int kItems = Config::kRegion / kStep;
  static constexpr int kItemBytes = kStep * Config::kTileN * sizeof(float);

  // A bit for every item of this loader that has some of features [first, last).
  static __device__ __forceinline__ uint32_t of(int32_t first, int32_t last) {
    uint32_t items = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int feature = first_feature() + kStep * i;
      items |= uint32_t(feature < last && first < feature + Config::kItemFeatures) << i;
    }
    return items;
  }

 protected:
  // Of this loader's first item. Opaque, or what is made of it is kept in registers, and spills.
  static __device__ __forceinline__ int first_feature() {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return Config::kItemFeatures * (thread / 32 - Config::kConsumers);
  }
};

template <VectorAccess kAccess>
class SddmmRegionOperand;

// A lane takes four vectors of an item, four features of four neighbouring columns, by way of its registers, where it
// turns them around; a row of eight lanes reads 32 features.
template <>
class SddmmRegionOperand<VectorAccess::kFeatures> : public SddmmRegionItems {
 public:
  static constexpr bool kAsync = false;

  __device__ __forceinline__ SddmmRegionOperand(const SddmmProblem& problem, const DenseView& view,
                                                const int32_t& features, int32_t region)
      : view_(view), features_(features) {
    const int64_t first = int64_t(region) * Config::kRegion;
    data_ = static_cast<const float*>(view.data) + first + feature() +
            (SddmmRegionColumns(problem).begin + 4 * vector()) * view.stride[2];
  }

  // width: columns of the tile.
  __device__ __forceinline__ void fetch(int32_t tile, int32_t width, uint32_t wanted) {
    int64_t stride = view_.stride[2];
    asm volatile("" : "+l"(stride));  // opaque, or its multiples are kept in registers, and spill
    const float* from = data_ + tile * (Config::kTileN * stride);
    if (features_ == Config::kRegion && width == Config::kTileN) {
#pragma unroll
      for (int r = 0; r < 4; ++r, from += stride) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          if (wanted >> i & 1) x_[i][r] = load(from + kStep * i);
        }
      }
      return;
    }
    const int features = features_ - feature();
    const int columns = width - 4 * vector();
#pragma unroll
    for (int r = 0; r < 4; ++r, from += stride) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        x_[i][r] = float4{};
        if ((wanted >> i & 1) && kStep * i < features && r < columns) x_[i][r] = load(from + kStep * i);
      }
    }
  }

  // What fetch() read last.
  __device__ __forceinline__ void put(float* operand, int32_t, int32_t, uint32_t wanted) {
    char* even = reinterpret_cast<char*>(operand) + (region_offset(feature()) ^ 16 * vector());
    char* odd = reinterpret_cast<char*>(operand) + (region_offset(feature() + 1) ^ 16 * vector());
#pragma unroll
    for (int i = 0; i < kItems; ++i, even += kItemBytes, odd += kItemBytes) {
      if (!(wanted >> i & 1)) continue;
      const auto& x = x_[i];
      store(even, {x[0].x, x[1].x, x[2].x, x[3].x});
      store(odd, {x[0].y, x[1].y, x[2].y, x[3].y});
      store(even + 128, {x[0].z, x[1].z, x[2].z, x[3].z});
      store(odd + 128, {x[0].w, x[1].w, x[2].w, x[3].w});
    }
  }

 private:
  // Which of the four vectors of a feature in a stage are the lane's.
  static __device__ __forceinline__ int vector() { return threadIdx.x % 32 / 8; }

  // Of the first item, the lane's first.
  static __device__ __forceinline__ int feature() { return first_feature() + 4 * static_cast<int>(threadIdx.x % 8); }

  static __device__ __forceinline__ float4 load(const float* from) {
    float4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from));
    return x;
  }

  static __device__ __forceinline__ void store(char* to, const float4& x) { *reinterpret_cast<float4*>(to) = x; }

  const DenseView& view_;
  const int32_t& features_;  // of the region, in shared memory
  const float* data_;        // of feature() in the lane's first column
  float4 x_[kItems][4];
};

// An operand that is copied without a register in between.
class SddmmRegionCopies : public SddmmRegionItems {
 public:
  static constexpr bool kAsync = true;

  __device__ __forceinline__ SddmmRegionCopies(const SddmmProblem& problem, const DenseView& view,
                                               const int32_t& features, int32_t region)
      : problem_(problem), view_(view), features_(features) {
    data_ = static_cast<const float*>(view.data) + int64_t(region) * Config::kRegion * view.stride_f;
  }

  __device__ __forceinline__ void fetch(int32_t, int32_t, uint32_t) {}

 protected:
  const SddmmProblem& problem_;
  const DenseView& view_;
  const int32_t& features_;  // of the region, in shared memory
  const float* data_;        // of its first feature in column 0
  int64_t offsets_ = 0;      // of some columns, one a lane
};

// Vectors of columns lie in a stage as they do in memory: they are copied without a register in between. A lane takes
// four of them of an item, of features f, 8 + f, 16 + f and 24 + f; a row of four lanes reads 16 columns.
template <>
class SddmmRegionOperand<VectorAccess::kColumns> : public SddmmRegionCopies {
 public:
  __device__ __forceinline__ SddmmRegionOperand(const SddmmProblem& problem, const DenseView& view,
                                                const int32_t& features, int32_t region)
      : SddmmRegionCopies(problem, view, features, region) {
    feature_ = first_feature() + threadIdx.x % 32 / 4;
    data_ += feature_ * view.stride_f;
  }

  // width: columns of the tile, a multiple of four.
  __device__ __forceinline__ void put(float* operand, int32_t tile, int32_t width, uint32_t wanted) {
    const float* from = data_ + offset_of(tile);
    const int64_t step = 8 * view_.stride_f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int feature = kStep * i + 8 * r;
        const bool inside = feature_ + feature < features_ && 4 * vector() < width;
        char* to = reinterpret_cast<char*>(operand) + (region_offset(feature_ + 8 * r) ^ 16 * vector());
        if (wanted >> i & 1) copy_async_16_and_near_or_zero(to + i * kItemBytes, from + feature / 8 * step, inside);
      }
    }
  }

 private:
  static __device__ __forceinline__ int vector() { return threadIdx.x % 4; }

  // Of the lane's columns of a tile. A lane finds out for one vector in each eight tiles, for it takes divisions.
  __device__ __forceinline__ int64_t offset_of(int32_t tile) {
    if (tile % 8 == 0) {
      const SddmmRegionColumns columns(problem_);
      const int64_t own = int64_t(tile) + threadIdx.x % 32 / 4;
      const int64_t column = columns.begin + own * Config::kTileN + 4 * vector();
      offsets_ = column < columns.end ? view_.column_offset(column) : 0;
    }
    return __shfl_sync(kFullWarp, offsets_, tile % 8 * 4 + vector());
  }

  int feature_;  // the lane's first, whose column 0 is at data_
};

// Element by element, two features x 16 columns or, where features lie beside each other, 32 features at a time.
template <>
class SddmmRegionOperand<VectorAccess::kNone> : public SddmmRegionCopies {
 public:
  using SddmmRegionCopies::SddmmRegionCopies;

  __device__ __forceinline__ void put(float* operand, int32_t tile, int32_t width, uint32_t wanted) {
    const int lane_idx = threadIdx.x % 32;
    find_offsets(tile);
    const bool along_features = view_.stride_f == 1;
#pragma unroll 1
    for (int i = 0; i < kItems; ++i) {
      if (!(wanted >> i & 1)) continue;
#pragma unroll 4
      for (int step = 0; step < 16; ++step) {
        const int column = along_features ? step : lane_idx % 16;
        const int feature = first_feature() + kStep * i + (along_features ? lane_idx : 2 * step + lane_idx / 16);
        const int64_t offset = __shfl_sync(kFullWarp, offsets_, tile % 2 * Config::kTileN + column);
        const bool inside = feature < features_ && column < width;
        const float* from = inside ? data_ + feature * view_.stride_f + offset : data_;
        char* to = reinterpret_cast<char*>(operand) + (region_offset(feature) ^ 16 * (column / 4)) + 4 * (column % 4);
        copy_async_4_or_zero(to, from, inside);
      }
    }
  }

 private:
  // Of the columns of two tiles, one a lane.
  __device__ __forceinline__ void find_offsets(int32_t tile) {
    if (tile % 2 != 0) return;
    const SddmmRegionColumns columns(problem_);
    const int64_t column = columns.begin + int64_t(tile) * Config::kTileN + threadIdx.x % 32;
    offsets_ = column < columns.end ? view_.column_offset(column) : 0;
  }
};

}  // namespace csb::cuda
