#include "cuda/convert/convert_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_count<__nv_bfloat16>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_pack<__nv_bfloat16>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_pack_bitmap<__nv_bfloat16>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_unpack<__nv_bfloat16>(const ConvertProblem&, cudaStream_t);

}  // namespace csb::cuda
