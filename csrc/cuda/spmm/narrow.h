#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

cudaError_t launch_narrow_bf16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);
cudaError_t launch_narrow_fp16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);

// Whether the tensors stand as the kernel reads them: X features last, in 16-byte pieces; columns equally far
// apart; block_size 64.
bool narrow_fits(const SpmmProblem& problem);

// Y = act(op(W) . X + bias) for at most config.tile_n = 8 or 16 columns, kBFloat16 or kFloat16, where
// narrow_fits(); anything else is cudaErrorInvalidValue. Strips that units share are left in
// problem.partials.
inline cudaError_t launch_narrow(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  switch (problem.dtype) {
    case DType::kBFloat16:
      return launch_narrow_bf16(problem, config, stream);
    case DType::kFloat16:
      return launch_narrow_fp16(problem, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace csb::cuda
