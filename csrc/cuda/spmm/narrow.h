#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

cudaError_t launch_narrow_bf16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);
cudaError_t launch_narrow_fp16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);
cudaError_t launch_narrow_float32(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);

// Whether the tensors stand as the kernels read them: values on 16 bytes; block_size 64. In 16 bit also X features
// last, in 16-byte pieces, and columns equally far apart.
bool narrow_fits(const SpmmProblem& problem);

// Y = act(op(W) . X + bias) where narrow_fits(): for at most narrow_columns(), in kFloat32 eight at a
// time. Anything else is cudaErrorInvalidValue. Strips that
// units share are left in problem.partials.
inline cudaError_t launch_narrow(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  switch (problem.dtype) {
    case DType::kBFloat16:
      return launch_narrow_bf16(problem, config, stream);
    case DType::kFloat16:
      return launch_narrow_fp16(problem, config, stream);
    case DType::kFloat32:
      return launch_narrow_float32(problem, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace csb::cuda
