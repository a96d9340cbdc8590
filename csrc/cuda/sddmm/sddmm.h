#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

// grad_values = (A . B^T) sampled at W's entries, on `stream`, with the join of the column runs.
// Enqueues only. problem.partials must be there when problem.column_splits > 1.
cudaError_t sddmm(const SddmmProblem& problem, const plan::CudaSddmmConfig& config, cudaStream_t stream);

// Whether the kernel of regions can read the tensors.
bool in_regions(const SddmmProblem& problem);

}  // namespace csb::cuda
