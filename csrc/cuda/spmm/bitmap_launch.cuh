#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/spmm/bitmap.cuh"
#include "cuda/spmm/bitmap.h"

namespace csb::cuda {

template <typename Scalar, bool kTransposed, int kTileN>
cudaError_t launch_bitmap_kernel(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  using Kernel = Bitmap<Scalar, kTransposed, kTileN>;
  const int32_t cluster = config.split_strips ? 1 : config.cluster;
  const WarpLaunch how = {config.split_strips, cluster};
  const int32_t items = config.split_strips ? problem.num_units : problem.strips();
  const dim3 grid(static_cast<uint32_t>(items * cluster),
                  static_cast<uint32_t>(ceil_div<int64_t>(problem.y.columns, kTileN)));
  return launch_dependent(bitmap_kernel<Scalar, kTransposed, kTileN>, grid, dim3(Kernel::kThreads),
                          sizeof(typename Kernel::Shared), cluster, stream, problem, how);
}

template <typename Scalar, bool kTransposed>
cudaError_t launch_bitmap_direction(const SpmmProblem& problem, const plan::CudaSpmmConfig& config,
                                    cudaStream_t stream) {
  switch (config.tile_n) {
    case 8:
      return launch_bitmap_kernel<Scalar, kTransposed, 8>(problem, config, stream);
    case 16:
      return launch_bitmap_kernel<Scalar, kTransposed, 16>(problem, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Scalar>
cudaError_t launch_bitmap_dtype(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  if (!bitmap_fits(problem)) return cudaErrorInvalidValue;
  return problem.transposed ? launch_bitmap_direction<Scalar, true>(problem, config, stream)
                            : launch_bitmap_direction<Scalar, false>(problem, config, stream);
}

}  // namespace csb::cuda
