#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"

namespace csb::cuda {

// Thread block tiles of the rows kernel: output strips x columns.
enum class RowsTile : int32_t { k1x64, k2x256 };

// Y = act(op(W) . X + bias) on CUDA cores: sums in registers, entries in the order of the output features, X in shared
// memory. Instantiated for float; block_size 64 and alignment 8 (another block size is cudaErrorInvalidValue). Every
// layout of X and Y; fast where X can be read in 16-byte vectors along features or along columns. With `split` a thread
// block walks a unit, which takes a tile of one strip (k2x256 is then cudaErrorInvalidValue); strips that units share
// are left in problem.partials, for launch_join(). With a cluster of 2, 4 or 8 (sm_90, k1x64, without split) as many
// thread blocks share a strip and join it themselves.
template <typename T>
cudaError_t launch_rows(const SpmmProblem& problem, RowsTile tile, bool split, int32_t cluster, cudaStream_t stream);

}  // namespace csb::cuda
