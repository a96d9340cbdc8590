#pragma once

#include <cuda_runtime.h>

#include "baseline/csr.h"

namespace csb::baseline {

// Y = W . X on the current device, any dtype. problem.scratch holds merge_scratch_bytes().
cudaError_t merge(const CsrSpmmProblem& problem, cudaStream_t stream);

// Of nnz, n and dtype only; at most 64 MiB, or two rows of sums where these alone are more.
size_t merge_scratch_bytes(const CsrSpmmProblem& problem);

}  // namespace csb::baseline
