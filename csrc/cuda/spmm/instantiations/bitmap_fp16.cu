#include "cuda/spmm/bitmap_launch.cuh"

namespace csb::cuda {

cudaError_t launch_bitmap_fp16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  return launch_bitmap_dtype<__half>(problem, config, stream);
}

}  // namespace csb::cuda
