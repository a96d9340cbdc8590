#pragma once

#include "cuda/device/numeric.cuh"

namespace csb::cuda {

// How the threads of a block walk a features x columns panel of an activation in global memory, so
// that neighbouring lanes touch neighbouring addresses.
enum class PanelAccess : int32_t {
  kFeatures,  // lanes along features: features last
  kVectors,   // lanes along columns, an aligned vector of columns each: features first
  kColumns,   // lanes along columns, one element each: anything else
};

template <typename T>
PanelAccess panel_access(const DenseView& view, int32_t vector_size) {
  if (view.stride_f == 1) return PanelAccess::kFeatures;
  const bool one_run = view.size[0] == 1 && view.size[1] == 1;
  const bool contiguous = view.stride[2] == 1 && (one_run || view.size[2] % vector_size == 0);
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % (vector_size * sizeof(T)) == 0 &&
                       view.stride_f % vector_size == 0 &&
                       (one_run || (view.stride[0] % vector_size == 0 && view.stride[1] % vector_size == 0));
  return contiguous && aligned ? PanelAccess::kVectors : PanelAccess::kColumns;
}

// A 64-feature panel in shared memory, element (f, j) at f * kPitch + j, moved by kThreads threads.
// The pitch is one vector longer than a row: then eight lanes that store (or read) vectors of eight
// consecutive features, or one row of them, hit every bank once.
template <typename T, int kTileN, int kThreads>
struct Panel {
  using Acc = AccOf<T>;
  static constexpr int kFeatures = 64;
  static constexpr int kVec = min_of<int>(kTileN, 16 / sizeof(Acc));
  static constexpr int kVectors = kTileN / kVec;
  static constexpr int kPitch = kTileN == 1 ? 1 : kTileN + kVec;
  static constexpr int kElements = kFeatures * kPitch;
  static constexpr int kItems = kFeatures * kVectors;  // an item is kVec columns of one feature
  static constexpr int kItemsPerThread = ceil_div(kItems, kThreads);
  static_assert(kTileN % kVec == 0, "a row of the panel is a whole number of vectors");

  struct Item {
    int feature;
    int vector;
  };

  static __device__ __forceinline__ Item item(PanelAccess access, int i) {
    int thread = threadIdx.x;
    // Opaque, or the addresses of every item are hoisted out of the block loop and spill.
    asm volatile("" : "+r"(thread));
    const int index = i * kThreads + thread;
    if (access == PanelAccess::kFeatures) return {index % kFeatures, index / kFeatures};
    return {index / kVectors, index % kVectors};
  }

  static __device__ __forceinline__ bool has_item(int i) {
    return kItems % kThreads == 0 || i * kThreads + static_cast<int>(threadIdx.x) < kItems;
  }

  static __device__ __forceinline__ int column(PanelAccess access, int vector, int v) {
    return access == PanelAccess::kColumns ? vector + v * kVectors : vector * kVec + v;
  }

  // Reads item i of the panel whose first feature is at `data`; what lies outside `features` x
  // `columns` reads as zero. offsets: of the panel's columns.
  static __device__ __forceinline__ void fetch(Acc (&out)[kVec], const T* data, int64_t stride_f,
                                               const int64_t* offsets, int features, int columns, PanelAccess access,
                                               int i) {
    const Item at = item(access, i);
    const T* row = data + at.feature * stride_f;
    const bool inside = has_item(i) && at.feature < features;
    if (inside && access == PanelAccess::kVectors && (at.vector + 1) * kVec <= columns) {
      const auto x = *reinterpret_cast<const Vector<T, kVec>*>(row + offsets[at.vector * kVec]);
#pragma unroll
      for (int v = 0; v < kVec; ++v) out[v] = to_acc(x.lane[v]);
      return;
    }
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      const int j = column(access, at.vector, v);
      out[v] = inside && j < columns ? to_acc(row[offsets[j]]) : Acc(0);
    }
  }

  static __device__ __forceinline__ void put(Acc* panel, const Acc (&in)[kVec], PanelAccess access, int i) {
    if (!has_item(i)) return;
    const Item at = item(access, i);
    Acc* row = panel + at.feature * kPitch;
    if (access == PanelAccess::kColumns) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) row[column(access, at.vector, v)] = in[v];
      return;
    }
    Vector<Acc, kVec> x;
#pragma unroll
    for (int v = 0; v < kVec; ++v) x.lane[v] = in[v];
    *reinterpret_cast<Vector<Acc, kVec>*>(row + at.vector * kVec) = x;
  }

  // Calls store(feature, column, value) for every element inside `features` x `columns`.
  template <typename Store>
  static __device__ __forceinline__ void drain(const Acc* panel, int features, int columns, PanelAccess access,
                                               Store&& store) {
#pragma unroll 1
    for (int i = 0; i < kItemsPerThread; ++i) {
      const Item at = item(access, i);
      if (!has_item(i) || at.feature >= features) continue;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        const int j = column(access, at.vector, v);
        if (j < columns) store(at.feature, j, panel[at.feature * kPitch + j]);
      }
    }
  }
};

}  // namespace csb::cuda
