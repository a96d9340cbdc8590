#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"

namespace csb::cuda {

// Thread block tiles of the rows kernel: output strips x columns.
enum class RowsTile : int32_t { k1x32, k1x64, k1x128, k4x128, k2x256 };

// Y = act(op(W) . X + bias) on CUDA cores, with accumulators in registers and entries in the order of the output
// features. kFloat32, block_size 64, alignment 8; anything else is cudaErrorInvalidValue. Every layout of X and Y.
// With `split` a thread block walks a unit, which takes a tile of one strip, and shared strips are left in
// problem.partials.
template <typename T>
cudaError_t launch_rows(const SpmmProblem& problem, RowsTile tile, bool split, cudaStream_t stream);

}  // namespace csb::cuda
