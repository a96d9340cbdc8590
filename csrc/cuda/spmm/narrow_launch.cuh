#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/spmm/narrow.cuh"
#include "cuda/spmm/narrow.h"

namespace csb::cuda {

template <typename Scalar, bool kTransposed>
cudaError_t launch_narrow_kernel(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  using Kernel = Narrow<Scalar, kTransposed>;
  const int32_t cluster = config.split_strips ? 1 : config.cluster;
  const WarpLaunch how = {config.split_strips, cluster};
  const int32_t items = config.split_strips ? problem.num_units : problem.strips();
  return launch_dependent(narrow_kernel<Scalar, kTransposed>, dim3(static_cast<uint32_t>(items * cluster)),
                          dim3(Kernel::kThreads), sizeof(typename Kernel::Shared), cluster, stream, problem, how);
}

template <typename Scalar>
cudaError_t launch_narrow_dtype(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  if (!narrow_fits(problem) || problem.y.columns > 8) return cudaErrorInvalidValue;
  return problem.transposed ? launch_narrow_kernel<Scalar, true>(problem, config, stream)
                            : launch_narrow_kernel<Scalar, false>(problem, config, stream);
}

}  // namespace csb::cuda
