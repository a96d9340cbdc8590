#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/device/operand_tile.cuh"
#include "cuda/spmm/rows.cuh"
#include "cuda/spmm/rows.h"

namespace csb::cuda {

inline bool aligned_to(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename Config, bool kTransposed>
cudaError_t launch_rows_direction(const SpmmProblem& problem, bool split, cudaStream_t stream) {
  using T = typename Config::T;
  constexpr int64_t kMaxGridY = 65535;
  constexpr int kVec = 16 / sizeof(T);
  if (split && Config::kStrips > 1) return cudaErrorInvalidValue;
  const DenseView& y = problem.y;
  RowsLaunch how;
  how.split = split;
  how.lanes_on_features = problem.x.stride_f == 1;
  how.one_run = problem.x.size[0] == 1 && problem.x.size[1] == 1;
  how.vector_entries = aligned_to(problem.values, 16) && aligned_to(problem.w.codes, 8);
  how.vector_output = y.stride_f == 1 && aligned_to(y.data, 16) && y.stride[0] % kVec == 0 && y.stride[1] % kVec == 0 &&
                      y.stride[2] % kVec == 0;
  const int64_t owners = split ? problem.num_units : ceil_div(problem.strips(), Config::kStrips);
  const int64_t tiles = ceil_div<int64_t>(y.columns, Config::kTileN);
  const dim3 grid(static_cast<unsigned>(owners), static_cast<unsigned>(min_of(tiles, kMaxGridY)));
  return launch(rows_kernel<Config, kTransposed>, grid, dim3(Config::kThreads), sizeof(RowsShared<Config>), stream,
                problem, how);
}

template <typename Config>
cudaError_t launch_rows_tile(const SpmmProblem& problem, bool split, cudaStream_t stream) {
  return problem.transposed ? launch_rows_direction<Config, true>(problem, split, stream)
                            : launch_rows_direction<Config, false>(problem, split, stream);
}

template <typename T>
cudaError_t launch_rows(const SpmmProblem& problem, RowsTile tile, bool split, cudaStream_t stream) {
  if (problem.w.block_shift != 6) return cudaErrorInvalidValue;
  switch (tile) {
    case RowsTile::k1x32:
      return launch_rows_tile<RowsConfig<T, 1, 1, 8, 4, 2, 1024, 3>>(problem, split, stream);
    case RowsTile::k1x64:
      return launch_rows_tile<RowsConfig<T, 1, 2, 8, 4, 2, 1024, 3>>(problem, split, stream);
    case RowsTile::k1x128:
      return launch_rows_tile<RowsConfig<T, 1, 4, 8, 4, 2, 1024, 2>>(problem, split, stream);
    case RowsTile::k2x128:
      return launch_rows_tile<RowsConfig<T, 2, 4, 8, 4, 2, 1536, 1>>(problem, split, stream);
    case RowsTile::k2x256:
      return launch_rows_tile<RowsConfig<T, 2, 8, 8, 4, 2, 1536, 1>>(problem, split, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace csb::cuda
