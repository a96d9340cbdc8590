#include "cuda/sddmm/gather_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_sddmm_gather<float>(const SddmmProblem&, const plan::CudaSddmmConfig&, cudaStream_t);

}  // namespace csb::cuda
