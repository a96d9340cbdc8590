#include "cuda/sddmm/tile_launch.cuh"

namespace csb::cuda {

cudaError_t launch_sddmm_tile_bf16(const SddmmProblem& problem, cudaStream_t stream) {
  return launch_sddmm_tile_dtype<__nv_bfloat16>(problem, stream);
}

}  // namespace csb::cuda
