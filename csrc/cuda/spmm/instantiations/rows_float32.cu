#include "cuda/spmm/rows_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_rows<float>(const SpmmProblem&, RowsTile, bool, int32_t, cudaStream_t);

}  // namespace csb::cuda
