#include "cuda/spmm/wide_launch.cuh"

namespace csb::cuda {

cudaError_t launch_wide_bf16(const SpmmProblem& problem, cudaStream_t stream) {
  return launch_wide_dtype<__nv_bfloat16>(problem, stream);
}

}  // namespace csb::cuda
