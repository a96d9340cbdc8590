#include "cuda/convert/convert_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_count<__half>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_pack<__half>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_pack_bitmap<__half>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_unpack<__half>(const ConvertProblem&, cudaStream_t);

}  // namespace csb::cuda
