#include "cuda/spmm/gather_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_gather<__nv_bfloat16>(const SpmmProblem&, const plan::CudaSpmmConfig&, cudaStream_t);

}  // namespace csb::cuda
