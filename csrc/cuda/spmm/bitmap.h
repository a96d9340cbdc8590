#pragma once

#include <cuda_runtime.h>

#include "cuda/spmm/narrow.h"

namespace csb::cuda {

cudaError_t launch_bitmap_bf16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);
cudaError_t launch_bitmap_fp16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);

// Whether the kernel reads the tensors as they stand: a bitmap, 16-bit values, and otherwise as narrow has it.
inline bool bitmap_fits(const SpmmProblem& problem) {
  const bool half = problem.dtype == DType::kBFloat16 || problem.dtype == DType::kFloat16;
  return problem.w.bitmap != nullptr && half && narrow_fits(problem);
}

// Y = act(op(W) . X + bias) where bitmap_fits(), config.tile_n columns (8 or 16) at a time. Anything else is
// cudaErrorInvalidValue. Strips that units share are left in problem.partials.
inline cudaError_t launch_bitmap(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  if (problem.dtype == DType::kBFloat16) return launch_bitmap_bf16(problem, config, stream);
  if (problem.dtype == DType::kFloat16) return launch_bitmap_fp16(problem, config, stream);
  return cudaErrorInvalidValue;
}

}  // namespace csb::cuda
