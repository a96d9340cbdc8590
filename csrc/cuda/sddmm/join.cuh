#pragma once

#include "cuda/device/numeric.cuh"

namespace csb::cuda {

constexpr int kSddmmJoinThreads = 256;

// Grid: x = runs of kSddmmJoinThreads entries.
//
// Adds the column runs of each entry, in order.
template <typename T>
__global__ void __launch_bounds__(kSddmmJoinThreads) sddmm_join_kernel(const __grid_constant__ SddmmProblem problem) {
  using Acc = AccOf<T>;
  const int64_t entry = int64_t(blockIdx.x) * kSddmmJoinThreads + threadIdx.x;
  if (entry >= problem.entries) return;
  const Acc* partial = static_cast<const Acc*>(problem.partials) + entry;
  Acc sum = 0;
#pragma unroll 4
  for (int32_t split = 0; split < problem.column_splits; ++split) sum += partial[split * problem.entries];
  static_cast<T*>(problem.grad_values)[entry] = from_acc<T>(sum);
}

}  // namespace csb::cuda
