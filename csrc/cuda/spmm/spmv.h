#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

// Blocks of 64, contiguous x, values on a 16-byte border.
inline bool spmv_fits(const SpmmProblem& problem) {
  return problem.w.block_shift == 6 && reinterpret_cast<uintptr_t>(problem.values) % 16 == 0 &&
         (problem.x.stride_f == 1 || problem.in_features() == 1);
}

// y = act(op(W) . x + bias) for a single column where spmv_fits(); anything else is cudaErrorInvalidValue. Strips that
// units share are left in problem.partials. Instantiated in instantiations/spmv_*.cu.
template <typename T>
cudaError_t launch_spmv(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);

}  // namespace csb::cuda
