#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

// Whether launch_sddmm_region() can read the tensors: float32, block_size 64, codes on 16 bytes.
bool region_fits(const SddmmProblem& problem);

// grad_values[e] = sum_j A[row(e), j] * B[col(e), j] on CUDA cores where region_fits(); anything else is
// cudaErrorInvalidValue. Every layout of A and B; fast where both can be read in 16-byte vectors along features, or
// both along columns. With several column splits their sums are left in problem.partials.
cudaError_t launch_sddmm_region(const SddmmProblem& problem, const plan::CudaSddmmConfig& config, cudaStream_t stream);

}  // namespace csb::cuda
