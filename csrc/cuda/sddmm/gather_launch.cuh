#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/sddmm/gather.cuh"
#include "cuda/sddmm/gather.h"

namespace csb::cuda {

template <typename T>
cudaError_t launch_sddmm_gather(const SddmmProblem& problem, const plan::CudaSddmmConfig& config, cudaStream_t stream) {
  using Block = SddmmGatherBlock<T>;
  if (config.tile_n != Block::Config::kTileN) return cudaErrorInvalidValue;
  const SddmmGatherLaunch how = {panel_access<T>(problem.a, Block::Config::kVec),
                                 panel_access<T>(problem.b, Block::Config::kVec)};
  const dim3 grid(static_cast<unsigned>(problem.num_units), static_cast<unsigned>(problem.column_splits));
  return launch(sddmm_gather_kernel<T>, grid, dim3(Block::Config::kThreads), sizeof(typename Block::Shared), stream,
                problem, how);
}

}  // namespace csb::cuda
