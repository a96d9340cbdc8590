#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

cudaError_t launch_sddmm_tile_bf16(const SddmmProblem& problem, cudaStream_t stream);
cudaError_t launch_sddmm_tile_fp16(const SddmmProblem& problem, cudaStream_t stream);

// grad_values[e] = sum_j A[row(e), j] * B[col(e), j] on the tensor cores: kBFloat16 or kFloat16,
// block_size 64, alignment 8; anything else is cudaErrorInvalidValue. With problem.column_splits > 1
// every split writes its float sums to problem.partials (zeros for padding), and the caller launches
// the join. The output must be 16-byte aligned. config.tile_n has no say: a tile is 2 x 2 blocks of W.
inline cudaError_t launch_sddmm_tile(const SddmmProblem& problem, const plan::CudaSddmmConfig&, cudaStream_t stream) {
  switch (problem.dtype) {
    case DType::kBFloat16:
      return launch_sddmm_tile_bf16(problem, stream);
    case DType::kFloat16:
      return launch_sddmm_tile_fp16(problem, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace csb::cuda
