#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

// The gather kernel for one dtype, T the type of a, b and grad_values. With several column splits
// their sums are left in problem.partials. Instantiated in instantiations/gather_*.cu.
template <typename T>
cudaError_t launch_sddmm_gather(const SddmmProblem& problem, const plan::CudaSddmmConfig& config, cudaStream_t stream);

}  // namespace csb::cuda
