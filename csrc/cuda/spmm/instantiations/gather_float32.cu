#include "cuda/spmm/gather_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_gather<float>(const SpmmProblem&, const plan::CudaSpmmConfig&, cudaStream_t);

}  // namespace csb::cuda
