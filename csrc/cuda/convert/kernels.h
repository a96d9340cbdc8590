#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"

namespace csb::cuda {

// The conversions for one dtype. Instantiated in instantiations/.
template <typename T>
cudaError_t launch_count(const ConvertProblem& problem, cudaStream_t stream);
template <typename T>
cudaError_t launch_pack(const ConvertProblem& problem, cudaStream_t stream);
template <typename T>
cudaError_t launch_pack_bitmap(const ConvertProblem& problem, cudaStream_t stream);
template <typename T>
cudaError_t launch_unpack(const ConvertProblem& problem, cudaStream_t stream);

}  // namespace csb::cuda
