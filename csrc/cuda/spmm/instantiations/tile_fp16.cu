#include "cuda/spmm/tile_launch.cuh"

namespace csb::cuda {

cudaError_t launch_tile_fp16(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  return launch_tile_dtype<__half>(problem, config, stream);
}

}  // namespace csb::cuda
