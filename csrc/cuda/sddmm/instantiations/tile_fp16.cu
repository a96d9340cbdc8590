#include "cuda/sddmm/tile_launch.cuh"

namespace csb::cuda {

cudaError_t launch_sddmm_tile_fp16(const SddmmProblem& problem, cudaStream_t stream) {
  return launch_sddmm_tile_dtype<__half>(problem, stream);
}

}  // namespace csb::cuda
