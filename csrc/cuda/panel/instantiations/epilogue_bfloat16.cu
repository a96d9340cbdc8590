#include "cuda/panel/epilogue_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_fill_bias<__nv_bfloat16>(const EpilogueProblem&, cudaStream_t);
template cudaError_t launch_activate<__nv_bfloat16>(const EpilogueProblem&, cudaStream_t);

}  // namespace csb::cuda
