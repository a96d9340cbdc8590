#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

// The gather kernel for one dtype, T the type of values, x and y. Strips that units share are left
// in problem.partials. Instantiated in instantiations/gather_*.cu.
template <typename T>
cudaError_t launch_gather(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);

}  // namespace csb::cuda
