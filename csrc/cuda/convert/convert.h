#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"

namespace csb::cuda {

// Kept elements of every block, into problem.counts.
cudaError_t count(const ConvertProblem& problem, cudaStream_t stream);

// The kept elements in row-major order inside each block, into problem.values and problem.codes;
// w.blk_ptr and w.blk_pad must agree with count().
cudaError_t pack(const ConvertProblem& problem, cudaStream_t stream);

// The same in quarter-major order, into problem.values and problem.bitmap.
cudaError_t pack_bitmap(const ConvertProblem& problem, cudaStream_t stream);

// The codes of a bitmap's entries in their order, into problem.codes; 0 for padding.
cudaError_t to_codes(const ConvertProblem& problem, cudaStream_t stream);

// Every element of problem.dense, stored or zero.
cudaError_t unpack(const ConvertProblem& problem, cudaStream_t stream);

}  // namespace csb::cuda
