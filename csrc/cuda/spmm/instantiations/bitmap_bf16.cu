#include "cuda/spmm/bitmap_launch.cuh"

namespace csb::cuda {

cudaError_t launch_bitmap_bf16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  return launch_bitmap_dtype<__nv_bfloat16>(problem, config, stream);
}

}  // namespace csb::cuda
