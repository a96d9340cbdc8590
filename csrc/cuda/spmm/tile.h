#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

cudaError_t launch_tile_bf16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);
cudaError_t launch_tile_fp16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);

// Y = act(op(W) . X + bias) on the tensor cores: kBFloat16 or kFloat16, block_size 64, alignment 8,
// config.tile_n 8, 32, 64 or 128; anything else is cudaErrorInvalidValue. Of strips that several units
// share it writes raw float sums to problem.partials, and the caller launches the join.
inline cudaError_t launch_tile(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  switch (problem.dtype) {
    case DType::kBFloat16:
      return launch_tile_bf16(problem, config, stream);
    case DType::kFloat16:
      return launch_tile_fp16(problem, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace csb::cuda
