#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

// Y = act(op(W) . X + bias) on `stream`, with the join of shared strips. Enqueues only: no
// synchronisation, no allocation. problem.partials must be there when config.split_strips and
// problem.num_units > 1.
cudaError_t spmm(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream);

// Whether the kernel for so many columns can read values, and x where it wants to, 16 bytes at a time.
bool in_pieces(const SpmmProblem& problem);

}  // namespace csb::cuda
