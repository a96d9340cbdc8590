#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"

namespace csb::cuda {

cudaError_t launch_wide_bf16(const SpmmProblem& problem, cudaStream_t stream);
cudaError_t launch_wide_fp16(const SpmmProblem& problem, cudaStream_t stream);

// Blocks of 64, values on a 16-byte border.
inline bool wide_fits(const SpmmProblem& problem) {
  return problem.w.block_shift == 6 && reinterpret_cast<uintptr_t>(problem.values) % 16 == 0;
}

// Y = act(op(W) . X + bias) on Hopper's tensor cores (compute capability 9.0): kBFloat16 or kFloat16, where
// wide_fits(); anything else is cudaErrorInvalidValue. X and Y may stand in any layout. Uses neither units nor
// partials: Y is complete when the one kernel is.
inline cudaError_t launch_wide(const SpmmProblem& problem, cudaStream_t stream) {
  switch (problem.dtype) {
    case DType::kBFloat16:
      return launch_wide_bf16(problem, stream);
    case DType::kFloat16:
      return launch_wide_fp16(problem, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace csb::cuda
