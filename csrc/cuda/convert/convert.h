#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"

namespace csb::cuda {

// Kept elements of every block, into problem.counts.
cudaError_t count(const ConvertProblem& problem, cudaStream_t stream);

// The kept elements in row-major order inside each block, into problem.values and problem.codes;
// w.blk_ptr and w.blk_pad must agree with count().
cudaError_t pack(const ConvertProblem& problem, cudaStream_t stream);

// Every element of problem.dense, stored or zero.
cudaError_t unpack(const ConvertProblem& problem, cudaStream_t stream);

}  // namespace csb::cuda
