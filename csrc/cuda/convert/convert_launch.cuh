#pragma once

#include "cuda/convert/bitmap.cuh"
#include "cuda/convert/convert.cuh"
#include "cuda/convert/kernels.h"
#include "cuda/device/launch.cuh"

namespace csb::cuda {

template <typename T>
cudaError_t launch_count(const ConvertProblem& problem, cudaStream_t stream) {
  return launch(count_kernel<T>, dim3(problem.w.num_blocks()), dim3(kConvertThreads), 0, stream, problem);
}

template <typename T>
cudaError_t launch_pack(const ConvertProblem& problem, cudaStream_t stream) {
  return launch(pack_kernel<T>, dim3(problem.w.num_blocks()), dim3(kConvertThreads), 0, stream, problem);
}

template <typename T>
cudaError_t launch_pack_bitmap(const ConvertProblem& problem, cudaStream_t stream) {
  return launch(pack_bitmap_kernel<T>, dim3(problem.w.num_blocks()), dim3(kConvertThreads), 0, stream, problem);
}

template <typename T>
cudaError_t launch_unpack(const ConvertProblem& problem, cudaStream_t stream) {
  const auto kernel = problem.w.bitmap != nullptr ? unpack_bitmap_kernel<T> : unpack_kernel<T>;
  return launch(kernel, dim3(problem.w.num_blocks()), dim3(kConvertThreads), 0, stream, problem);
}

}  // namespace csb::cuda
