#include "cuda/spmm/spmv_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_spmv<double>(const SpmmProblem&, const plan::CudaSpmmConfig&, cudaStream_t);

}  // namespace csb::cuda
