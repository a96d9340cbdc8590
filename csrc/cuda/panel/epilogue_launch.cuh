#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/panel/epilogue.cuh"
#include "cuda/panel/kernels.h"

namespace csb::cuda {

constexpr int64_t kMostRunsOfGrid = 65535;

template <typename T, int kCount>
cudaError_t launch_epilogue(void (*kernel)(EpilogueProblem), const EpilogueProblem& problem, cudaStream_t stream) {
  const int64_t pieces = ceil_div<int64_t>(problem.length, kEpilogueThreads * kCount);
  if (pieces > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<uint32_t>(pieces), static_cast<uint32_t>(min_of(problem.runs, kMostRunsOfGrid)));
  return launch(kernel, grid, dim3(kEpilogueThreads), 0, stream, problem);
}

// Whether every run is whole 16-byte pieces.
template <typename T>
bool in_pieces(const EpilogueProblem& problem) {
  constexpr int kCount = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(problem.data) % 16 == 0 && problem.length % kCount == 0 &&
         (problem.stride % kCount == 0 || problem.runs == 1);
}

template <typename T>
cudaError_t launch_fill_bias(const EpilogueProblem& problem, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  return in_pieces<T>(problem) ? launch_epilogue<T, kCount>(fill_bias_kernel<T, kCount>, problem, stream)
                               : launch_epilogue<T, 1>(fill_bias_kernel<T, 1>, problem, stream);
}

template <typename T>
cudaError_t launch_activate(const EpilogueProblem& problem, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  return in_pieces<T>(problem) ? launch_epilogue<T, kCount>(activate_kernel<T, kCount>, problem, stream)
                               : launch_epilogue<T, 1>(activate_kernel<T, 1>, problem, stream);
}

}  // namespace csb::cuda
