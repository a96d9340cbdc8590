#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/spmm/narrow.cuh"
#include "cuda/spmm/narrow.h"

namespace csb::cuda {

template <typename Scalar, bool kTransposed, int kTileN>
cudaError_t launch_narrow_kernel(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  using Kernel = Narrow<Scalar, kTransposed, kTileN>;
  const int32_t cluster = config.split_strips ? 1 : config.cluster;
  const NarrowLaunch how = {config.split_strips, cluster};
  const int32_t items = config.split_strips ? problem.num_units : problem.strips();
  return launch_dependent(narrow_kernel<Scalar, kTransposed, kTileN>, dim3(static_cast<uint32_t>(items * cluster)),
                          dim3(Kernel::kThreads), sizeof(typename Kernel::Shared), cluster, stream, problem, how);
}

template <typename Scalar>
cudaError_t launch_narrow_dtype(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  if (!narrow_fits(problem) || problem.y.columns > config.tile_n) return cudaErrorInvalidValue;
  switch (config.tile_n) {
    case 8:
      return problem.transposed ? launch_narrow_kernel<Scalar, true, 8>(problem, config, stream)
                                : launch_narrow_kernel<Scalar, false, 8>(problem, config, stream);
    case 16:
      return problem.transposed ? launch_narrow_kernel<Scalar, true, 16>(problem, config, stream)
                                : launch_narrow_kernel<Scalar, false, 16>(problem, config, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace csb::cuda
