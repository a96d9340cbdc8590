#include "cuda/spmm/wide_launch.cuh"

namespace csb::cuda {

cudaError_t launch_wide_fp16(const SpmmProblem& problem, cudaStream_t stream) {
  return launch_wide_dtype<__half>(problem, stream);
}

}  // namespace csb::cuda
