#pragma once

#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/sddmm/tile.cuh"
#include "cuda/sddmm/tile.h"

namespace csb::cuda {

template <typename Scalar, bool kAFeaturesFirst, bool kBFeaturesFirst>
cudaError_t launch_sddmm_tile_kernel(const SddmmProblem& problem, cudaStream_t stream) {
  using Config = SddmmTileConfig;
  using Tile = SddmmTile<Scalar, kAFeaturesFirst, kBFeaturesFirst>;
  const int32_t tiles_k = ceil_div(problem.w.kb, Config::kBlocks);
  const int64_t tiles = static_cast<int64_t>(ceil_div(problem.w.mb, Config::kBlocks)) * tiles_k;
  const int64_t steps = ceil_div<int64_t>(problem.a.columns, Config::kColumns);
  const int64_t split_steps = ceil_div<int64_t>(steps, problem.column_splits);
  if (tiles * problem.column_splits > INT32_MAX || split_steps > INT32_MAX) return cudaErrorInvalidConfiguration;
  const SddmmTileLaunch tile = {tiles_k, static_cast<int32_t>(tiles), static_cast<int32_t>(split_steps),
                                operand_vectorized(problem.a, kAFeaturesFirst),
                                operand_vectorized(problem.b, kBFeaturesFirst)};
  return launch(sddmm_tile<Scalar, kAFeaturesFirst, kBFeaturesFirst>,
                dim3(static_cast<uint32_t>(tiles * problem.column_splits)), dim3(Config::kThreads),
                sizeof(typename Tile::Shared), stream, problem, tile);
}

template <typename Scalar>
cudaError_t launch_sddmm_tile_dtype(const SddmmProblem& problem, cudaStream_t stream) {
  if (problem.w.block_shift != 6) return cudaErrorInvalidValue;
  const void* out = problem.column_splits > 1 ? problem.partials : problem.grad_values;
  if (reinterpret_cast<uintptr_t>(out) % 16 != 0) return cudaErrorMisalignedAddress;
  if (operand_features_first(problem.a)) {
    return operand_features_first(problem.b) ? launch_sddmm_tile_kernel<Scalar, true, true>(problem, stream)
                                             : launch_sddmm_tile_kernel<Scalar, true, false>(problem, stream);
  }
  return operand_features_first(problem.b) ? launch_sddmm_tile_kernel<Scalar, false, true>(problem, stream)
                                           : launch_sddmm_tile_kernel<Scalar, false, false>(problem, stream);
}

}  // namespace csb::cuda
