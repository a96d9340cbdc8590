#include "cuda/spmm/narrow_launch.cuh"

namespace csb::cuda {

cudaError_t launch_narrow_fp16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  return launch_narrow_dtype<__half>(problem, config, stream);
}

}  // namespace csb::cuda
