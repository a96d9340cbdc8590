#pragma once

#include "csb/panel.h"
#include "cuda/device/epilogue.cuh"

namespace csb::cuda {

constexpr int kEpilogueThreads = 128;

// Grid of both: x = pieces of kCount elements of a run, y = runs, as far as the grid reaches.

template <typename T, int kCount>
__global__ void __launch_bounds__(kEpilogueThreads) fill_bias_kernel(const __grid_constant__ EpilogueProblem problem) {
  using Piece = Vector<T, kCount>;
  const int64_t at = (int64_t(blockIdx.x) * kEpilogueThreads + threadIdx.x) * kCount;
  if (at >= problem.length) return;
  const T* bias = static_cast<const T*>(problem.bias);
  int64_t feature = at / problem.columns_per_feature;
  int64_t column = at - feature * problem.columns_per_feature;
  Piece piece;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    piece.lane[i] = bias[feature];
    if (++column == problem.columns_per_feature && i + 1 < kCount) {
      column = 0;
      ++feature;
    }
  }
  for (int64_t run = blockIdx.y; run < problem.runs; run += gridDim.y) {
    *reinterpret_cast<Piece*>(static_cast<T*>(problem.data) + run * problem.stride + at) = piece;
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kEpilogueThreads) activate_kernel(const __grid_constant__ EpilogueProblem problem) {
  using Piece = Vector<T, kCount>;
  const int64_t at = (int64_t(blockIdx.x) * kEpilogueThreads + threadIdx.x) * kCount;
  if (at >= problem.length) return;
  const Epilogue<T> epilogue = {nullptr, problem.activation};
  for (int64_t run = blockIdx.y; run < problem.runs; run += gridDim.y) {
    Piece* place = reinterpret_cast<Piece*>(static_cast<T*>(problem.data) + run * problem.stride + at);
    Piece piece = *place;
#pragma unroll
    for (int i = 0; i < kCount; ++i) piece.lane[i] = epilogue.finish(to_acc(piece.lane[i]), AccOf<T>(0));
    *place = piece;
  }
}

}  // namespace csb::cuda
