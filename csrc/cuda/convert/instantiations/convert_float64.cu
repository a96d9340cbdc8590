#include "cuda/convert/convert_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_count<double>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_pack<double>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_pack_bitmap<double>(const ConvertProblem&, cudaStream_t);
template cudaError_t launch_unpack<double>(const ConvertProblem&, cudaStream_t);

}  // namespace csb::cuda
