#pragma once

#include "csb/problem.h"

namespace csb::plan {

// A panel is a dense copy of some block rows of W (block columns for W^T) that lives for one product
// of the library. It is never all of W, and never more than this.
constexpr int64_t kMaxPanelBytes = int64_t{32} << 20;

// What a product says of itself to have panels considered. Nothing is offered by default.
struct PanelOffer {
  bool fits = false;     // the library's product can read and write the tensors as they lie
  int64_t features = 0;  // what panels cut: m for W . X and for SDDMM, k for W^T . X
  int64_t depth = 0;     // the other dimension of W
  int64_t stored = 0;    // entries of W, padding included
};

struct PanelChoice {
  int32_t features;  // of one panel, a multiple of every block size; 0 where the other kernels are better
  const char* reason;
};

PanelChoice choose_spmm_panel(DType dtype, int32_t block_shift, int64_t columns, int32_t multiprocessors,
                              const PanelOffer& offer);
PanelChoice choose_sddmm_panel(DType dtype, int32_t block_shift, int64_t columns, int32_t multiprocessors,
                               const PanelOffer& offer);

// Features of one panel of a product `width` wide (columns, or k for SDDMM), 0 where there is none.
int32_t panel_features(DType dtype, int64_t width, int32_t multiprocessors, const PanelOffer& offer);

}  // namespace csb::plan
