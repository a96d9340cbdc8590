#pragma once

#include <cstdint>

#include "cuda/device/launch.cuh"
#include "cuda/spmm/tile.cuh"
#include "cuda/spmm/tile.h"

namespace csb::cuda {

template <typename Scalar, bool kTransposed, bool kFeaturesFirst, int kTileN>
cudaError_t launch_tile_kernel(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  using Tile = SpmmTile<Scalar, kTransposed, kFeaturesFirst, kTileN>;
  // Without blocks no unit covers a strip, yet every strip needs its bias.
  const bool split_strips = config.split_strips && problem.blocks_per_strip() > 0;
  const TileLaunch tile = {split_strips ? problem.num_units : problem.strips(), split_strips,
                           operand_vectorized(problem.x, kFeaturesFirst),
                           reinterpret_cast<uintptr_t>(problem.values) % 8 == 0};
  const int64_t blocks = tile.items * ceil_div<int64_t>(problem.y.columns, kTileN);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(spmm_tile<Scalar, kTransposed, kFeaturesFirst, kTileN>, dim3(static_cast<uint32_t>(blocks)),
                dim3(Tile::kThreads), sizeof(typename Tile::Shared), stream, problem, tile);
}

template <typename Scalar, bool kTransposed, bool kFeaturesFirst>
cudaError_t launch_tile_width(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  switch (config.tile_n) {
    case 8:
      return launch_tile_kernel<Scalar, kTransposed, kFeaturesFirst, 8>(problem, config, stream);
    case 32:
      return launch_tile_kernel<Scalar, kTransposed, kFeaturesFirst, 32>(problem, config, stream);
    case 64:
      return launch_tile_kernel<Scalar, kTransposed, kFeaturesFirst, 64>(problem, config, stream);
    case 128:
      return launch_tile_kernel<Scalar, kTransposed, kFeaturesFirst, 128>(problem, config, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename Scalar>
cudaError_t launch_tile_dtype(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  if (problem.w.block_shift != 6) return cudaErrorInvalidValue;
  if (operand_features_first(problem.x)) {
    return problem.transposed ? launch_tile_width<Scalar, true, true>(problem, config, stream)
                              : launch_tile_width<Scalar, false, true>(problem, config, stream);
  }
  return problem.transposed ? launch_tile_width<Scalar, true, false>(problem, config, stream)
                            : launch_tile_width<Scalar, false, false>(problem, config, stream);
}

}  // namespace csb::cuda
