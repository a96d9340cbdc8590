#include "cuda/spmm/spmv_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_spmv<__nv_bfloat16>(const SpmmProblem&, const plan::CudaSpmmConfig&, cudaStream_t);

}  // namespace csb::cuda
