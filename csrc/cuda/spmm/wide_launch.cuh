#pragma once

#include <atomic>

#include "cuda/device/launch.cuh"
#include "cuda/spmm/wide.cuh"
#include "cuda/spmm/wide.h"

namespace csb::cuda {

constexpr int32_t kMaxWideSplits = 8;

// Clusters of `splits` thread blocks that run at once. It takes the driver long to say, so each device is
// asked once.
template <auto kKernel>
cudaError_t wide_clusters(const cudaLaunchConfig_t& config, int32_t splits, int32_t& active) {
  constexpr int kDevices = 64;
  static std::atomic<int32_t> known[kDevices][kMaxWideSplits + 1] = {};  // one more than the number
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device < kDevices) {
    active = known[device][splits].load(std::memory_order_relaxed) - 1;
    if (active >= 0) return cudaSuccess;
  }
  error = cudaOccupancyMaxActiveClusters(&active, kKernel, &config);
  if (error == cudaSuccess && device < kDevices) known[device][splits].store(active + 1, std::memory_order_relaxed);
  return error;
}

// The number of thread blocks that share a group, so that the longest-running multiprocessor has the
// fewest steps. A thread block pays about kFixedSteps for its start and end.
template <typename Query>
cudaError_t choose_wide_splits(int64_t items, int32_t steps, Query&& active_clusters, int32_t& best) {
  constexpr int32_t kFixedSteps = 4;
  int64_t best_cost = INT64_MAX;
  for (int32_t splits = 1; splits <= kMaxWideSplits && (splits == 1 || splits <= steps); ++splits) {
    int32_t active = 0;
    const cudaError_t error = active_clusters(splits, active);
    if (error != cudaSuccess) return error;
    if (active == 0) continue;
    const int64_t cost = ceil_div<int64_t>(items, active) * (ceil_div(steps, splits) + kFixedSteps);
    if (cost < best_cost) {
      best_cost = cost;
      best = splits;
    }
  }
  return best_cost == INT64_MAX ? cudaErrorInvalidConfiguration : cudaSuccess;
}

template <typename Scalar, bool kTransposed, bool kFeaturesFirst>
cudaError_t launch_wide_kernel(const SpmmProblem& problem, cudaStream_t stream) {
  using Kernel = Wide<Scalar, kTransposed, kFeaturesFirst>;
  constexpr auto kernel = &wide_kernel<Scalar, kTransposed, kFeaturesFirst>;
  const int64_t tiles = ceil_div<int64_t>(problem.y.columns, 64);
  WideLaunch how{};
  how.groups = ceil_div(problem.strips(), 4);
  if (how.groups == 0 || tiles == 0) return cudaSuccess;
  if (tiles > 65535) return cudaErrorInvalidConfiguration;
  how.x_vectorized = operand_vectorized(problem.x, kFeaturesFirst);
  how.y_vectorized = problem.y.stride_f == 1 && reinterpret_cast<uintptr_t>(problem.y.data) % 8 == 0;
  for (int level = 0; level < 3; ++level) {
    how.y_vectorized = how.y_vectorized && (problem.y.size[level] == 1 || problem.y.stride[level] % 4 == 0);
  }

  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(sizeof(typename Kernel::Shared)));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(how.groups), static_cast<uint32_t>(tiles));
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = sizeof(typename Kernel::Shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const auto active_clusters = [&](int32_t splits, int32_t& active) {
    cluster.val.clusterDim.x = splits;
    config.gridDim.x = static_cast<uint32_t>(how.groups) * splits;
    return wide_clusters<kernel>(config, splits, active);
  };
  error = choose_wide_splits(how.groups * tiles, problem.blocks_per_strip(), active_clusters, how.splits);
  if (error != cudaSuccess) return error;
  cluster.val.clusterDim.x = how.splits;
  config.gridDim.x = static_cast<uint32_t>(how.groups) * how.splits;
  error = cudaLaunchKernelEx(&config, kernel, problem, how);
  return error != cudaSuccess ? error : cudaGetLastError();
}

template <typename Scalar>
cudaError_t launch_wide_dtype(const SpmmProblem& problem, cudaStream_t stream) {
  if (!wide_fits(problem)) return cudaErrorInvalidValue;
  if (operand_features_first(problem.x)) {
    return problem.transposed ? launch_wide_kernel<Scalar, true, true>(problem, stream)
                              : launch_wide_kernel<Scalar, false, true>(problem, stream);
  }
  return problem.transposed ? launch_wide_kernel<Scalar, true, false>(problem, stream)
                            : launch_wide_kernel<Scalar, false, false>(problem, stream);
}

}  // namespace csb::cuda
