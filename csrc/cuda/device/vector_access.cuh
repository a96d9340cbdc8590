#pragma once

#include "cuda/device/panel.cuh"

namespace csb::cuda {

// How a warp reads an activation in float32.
enum class VectorAccess : int32_t {
  kFeatures,  // aligned vectors of four features: features last, columns equally far apart
  kColumns,   // aligned vectors of four columns: features first
  kNone,      // anything else, element by element
};

inline bool aligned_to(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline VectorAccess vector_access(const DenseView& view, int32_t features) {
  if (view.stride_f == 1) {
    const bool one_run = view.size[0] == 1 && view.size[1] == 1;
    const bool aligned = aligned_to(view.data, 16) && view.stride[2] % 4 == 0 && features % 4 == 0;
    return one_run && aligned ? VectorAccess::kFeatures : VectorAccess::kNone;
  }
  const bool vectors = panel_access<float>(view, 4) == PanelAccess::kVectors && view.columns % 4 == 0;
  return vectors ? VectorAccess::kColumns : VectorAccess::kNone;
}

}  // namespace csb::cuda
