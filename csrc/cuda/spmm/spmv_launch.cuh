#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/spmm/spmv.cuh"
#include "cuda/spmm/spmv.h"

namespace csb::cuda {

template <typename T, bool kTransposed>
cudaError_t launch_spmv_kernel(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  using Kernel = Spmv<T, kTransposed>;
  const int32_t cluster = config.split_strips ? 1 : config.cluster;
  const SpmvLaunch how = {config.split_strips, cluster};
  const int32_t items = config.split_strips ? problem.num_units : problem.strips();
  return launch_dependent(spmv_kernel<T, kTransposed>, dim3(static_cast<uint32_t>(items * cluster)),
                          dim3(Kernel::kThreads), sizeof(typename Kernel::Shared), cluster, stream, problem, how);
}

template <typename T>
cudaError_t launch_spmv(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  if (!spmv_fits(problem) || problem.y.columns != 1) return cudaErrorInvalidValue;
  return problem.transposed ? launch_spmv_kernel<T, true>(problem, config, stream)
                            : launch_spmv_kernel<T, false>(problem, config, stream);
}

}  // namespace csb::cuda
