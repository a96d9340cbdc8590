#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/spmm/rows.cuh"
#include "cuda/spmm/rows.h"
#include "plan/cuda_config.h"

namespace csb::cuda {

template <typename Config, VectorAccess kAccess, bool kTransposed>
cudaError_t launch_rows_kernel(const SpmmProblem& problem, bool split, int32_t cluster, cudaStream_t stream) {
  using T = typename Config::T;
  constexpr int64_t kMaxGridY = 65535;
  constexpr int kVec = 16 / sizeof(T);
  if (split && (Config::kStrips > 1 || Config::kCluster)) return cudaErrorInvalidValue;
  const DenseView& y = problem.y;
  const int64_t tiles = ceil_div<int64_t>(y.columns, Config::kTileN);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  RowsLaunch how;
  how.tiles = static_cast<int32_t>(tiles);
  how.split = split;
  how.cluster = cluster;
  how.lanes_on_features = problem.x.stride_f == 1;
  how.vector_entries = aligned_to(problem.values, 16) && aligned_to(problem.w.codes, 8);
  how.vector_output = y.stride_f == 1 && aligned_to(y.data, 16) && y.stride[0] % kVec == 0 && y.stride[1] % kVec == 0 &&
                      y.stride[2] % kVec == 0;
  if (Config::kCluster && tiles > kMaxGridY) return cudaErrorInvalidValue;  // a thread block joins one tile
  const int64_t owners = split ? problem.num_units : ceil_div(problem.strips(), Config::kStrips) * int64_t{cluster};
  const dim3 grid(static_cast<unsigned>(owners), static_cast<unsigned>(min_of(tiles, kMaxGridY)));
  constexpr size_t kShared = sizeof(RowsShared<Config>);
  const auto kernel = rows_kernel<Config, kAccess, kTransposed>;
  if constexpr (Config::kCluster) {
    return launch_dependent(kernel, grid, dim3(Config::kThreads), kShared, cluster, stream, problem, how);
  }
  return launch(kernel, grid, dim3(Config::kThreads), kShared, stream, problem, how);
}

template <typename Config, VectorAccess kAccess>
cudaError_t launch_rows_direction(const SpmmProblem& problem, bool split, int32_t cluster, cudaStream_t stream) {
  return problem.transposed ? launch_rows_kernel<Config, kAccess, true>(problem, split, cluster, stream)
                            : launch_rows_kernel<Config, kAccess, false>(problem, split, cluster, stream);
}

template <typename Config>
cudaError_t launch_rows_tile(const SpmmProblem& problem, bool split, int32_t cluster, cudaStream_t stream) {
  switch (vector_access(problem.x, problem.in_features())) {
    case VectorAccess::kFeatures:
      return launch_rows_direction<Config, VectorAccess::kFeatures>(problem, split, cluster, stream);
    case VectorAccess::kColumns:
      return launch_rows_direction<Config, VectorAccess::kColumns>(problem, split, cluster, stream);
    case VectorAccess::kNone:
      return launch_rows_direction<Config, VectorAccess::kNone>(problem, split, cluster, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T, bool kCluster = false>
using NarrowRows = RowsConfig<T, 1, 2, 8, 4, 4, 1024, 16, 2, kCluster>;
template <typename T>
using WideRows = RowsConfig<T, 2, 8, 8, 4, 2, 1536, 16, 1>;

template <typename T>
cudaError_t launch_rows(const SpmmProblem& problem, RowsTile tile, bool split, int32_t cluster, cudaStream_t stream) {
  static_assert(sizeof(RowsShared<NarrowRows<T>>) <= plan::kRowsSharedBytes, "the planner asks the chip for as much");
  static_assert(sizeof(RowsShared<WideRows<T>>) <= plan::kWideRowsSharedBytes, "the planner asks the chip for as much");
  if (problem.w.block_shift != 6) return cudaErrorInvalidValue;
  switch (tile) {
    case RowsTile::k1x64:
      return cluster == 1 ? launch_rows_tile<NarrowRows<T>>(problem, split, 1, stream)
                          : launch_rows_tile<NarrowRows<T, true>>(problem, split, cluster, stream);
    case RowsTile::k2x256:
      if (cluster > 1) break;
      return launch_rows_tile<WideRows<T>>(problem, split, cluster, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace csb::cuda
