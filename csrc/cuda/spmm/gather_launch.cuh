#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/spmm/gather.cuh"
#include "cuda/spmm/gather.h"

namespace csb::cuda {

template <typename T, int kTileN, bool kTransposed>
cudaError_t launch_gather_tile(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  using Block = GatherBlock<T, kTileN, kTransposed>;
  constexpr int64_t kMaxGridY = 65535;
  const PanelAccess y_access = problem.y.stride_f == 1 ? PanelAccess::kFeatures : PanelAccess::kColumns;
  const GatherLaunch how = {config.split_strips, panel_access<T>(problem.x, Block::Config::kVec), y_access};
  const int64_t owners = how.split ? problem.num_units : problem.strips();
  const int64_t subs = max_of(1, problem.w.block_size() / Block::Config::kBlock);
  const int64_t tiles = ceil_div<int64_t>(problem.y.columns, kTileN);
  if (owners * subs > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(owners * subs), static_cast<unsigned>(min_of(tiles, kMaxGridY)));
  return launch(gather_kernel<T, kTileN, kTransposed>, grid, dim3(Block::Config::kThreads),
                sizeof(typename Block::Shared), stream, problem, how);
}

template <typename T, int kTileN>
cudaError_t launch_gather_direction(const SpmmProblem& problem, const plan::CudaSpmmConfig& config,
                                    cudaStream_t stream) {
  return problem.transposed ? launch_gather_tile<T, kTileN, true>(problem, config, stream)
                            : launch_gather_tile<T, kTileN, false>(problem, config, stream);
}

template <typename T>
cudaError_t launch_gather(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  switch (config.tile_n) {
    case 1:
      return launch_gather_direction<T, 1>(problem, config, stream);
    case 8:
      return launch_gather_direction<T, 8>(problem, config, stream);
    case 32:
      return launch_gather_direction<T, 32>(problem, config, stream);
    case 64:
      return launch_gather_direction<T, 64>(problem, config, stream);
    case 128:
      // A row of 128 doubles would need more lanes than a warp has.
      if constexpr (sizeof(AccOf<T>) == 4) return launch_gather_direction<T, 128>(problem, config, stream);
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace csb::cuda
