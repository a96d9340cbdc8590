#include "cuda/convert/convert_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_count<float>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_pack<float>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_pack_bitmap<float>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_unpack<float>(const ConvertProblem&, cudaStream_t);

}  // namespace csb::cuda
