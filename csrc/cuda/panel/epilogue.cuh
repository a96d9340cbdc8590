#pragma once

#include "csb/panel.h"
#include "cuda/device/epilogue.cuh"

namespace csb::cuda {

constexpr int kEpilogueThreads = 128;

// The biases of kCount neighbouring elements of a run, from element `at` on.
template <typename T, int kCount>
__device__ __forceinline__ Vector<T, kCount> bias_of(const EpilogueProblem& problem, int64_t at) {
  const T* bias = static_cast<const T*>(problem.bias);
  int64_t feature = at / problem.columns_per_feature;
  int64_t column = at - feature * problem.columns_per_feature;
  Vector<T, kCount> piece;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    piece.lane[i] = bias[feature];
    if (++column == problem.columns_per_feature && i + 1 < kCount) {
      column = 0;
      ++feature;
    }
  }
  return piece;
}

// Grid of both: x = pieces of kCount elements of a run, y = runs, as far as the grid reaches.

template <typename T, int kCount>
__global__ void __launch_bounds__(kEpilogueThreads) fill_bias_kernel(const __grid_constant__ EpilogueProblem problem) {
  using Piece = Vector<T, kCount>;
  const int64_t at = (int64_t(blockIdx.x) * kEpilogueThreads + threadIdx.x) * kCount;
  if (at >= problem.length) return;
  const Piece piece = bias_of<T, kCount>(problem, at);
  for (int64_t run = blockIdx.y; run < problem.runs; run += gridDim.y) {
    *reinterpret_cast<Piece*>(static_cast<T*>(problem.data) + run * problem.stride + at) = piece;
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kEpilogueThreads) activate_kernel(const __grid_constant__ EpilogueProblem problem) {
  using Piece = Vector<T, kCount>;
  const int64_t at = (int64_t(blockIdx.x) * kEpilogueThreads + threadIdx.x) * kCount;
  if (at >= problem.length) return;
  AccOf<T> bias[kCount] = {};
  if (problem.bias != nullptr) {
    const Piece piece = bias_of<T, kCount>(problem, at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) bias[i] = to_acc(piece.lane[i]);
  }
  const Epilogue<T> epilogue = {nullptr, problem.activation};
  for (int64_t run = blockIdx.y; run < problem.runs; run += gridDim.y) {
    Piece* place = reinterpret_cast<Piece*>(static_cast<T*>(problem.data) + run * problem.stride + at);
    Piece piece = *place;
#pragma unroll
    for (int i = 0; i < kCount; ++i) piece.lane[i] = epilogue.finish(to_acc(piece.lane[i]), bias[i]);
    *place = piece;
  }
}

}  // namespace csb::cuda
