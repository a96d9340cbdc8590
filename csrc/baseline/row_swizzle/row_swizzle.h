#pragma once

#include <cuda_runtime.h>

#include "baseline/csr.h"

namespace csb::baseline {

// Y = W . X, where a sub-warp computes one row by one panel of columns of Y and rows are taken longest first, so that
// the rows of a warp are about equally long. After Gale, Zaharia, Young and Elsen, "Sparse GPU Kernels for Deep
// Learning", SC 2020. A row of X must be shorter than 4 GiB.
cudaError_t row_swizzle(const CsrSpmmProblem& problem, cudaStream_t stream);

}  // namespace csb::baseline
