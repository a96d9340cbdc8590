#pragma once

#include "csb/problem.h"
#include "cuda/device/numeric.cuh"

namespace csb::cuda {

constexpr int kConvertThreads = 256;

// One block of W and the walk of a thread block over its elements.
template <typename T>
struct DenseBlock {
  __device__ __forceinline__ explicit DenseBlock(const ConvertProblem& problem)
      : problem(problem), block_shift(problem.w.block_shift) {
    const int32_t block_row = blockIdx.x / problem.w.kb;
    const int32_t block_col = blockIdx.x % problem.w.kb;
    row_begin = int64_t(block_row) << block_shift;
    col_begin = int64_t(block_col) << block_shift;
    rows = static_cast<int>(min_of<int64_t>(problem.w.m - row_begin, 1 << block_shift));
    cols = static_cast<int>(min_of<int64_t>(problem.w.k - col_begin, 1 << block_shift));
    along_rows = problem.stride_row < problem.stride_col;
  }

  __device__ __forceinline__ T& at(int row, int col) const {
    return static_cast<T*>(
        problem.dense)[(row_begin + row) * problem.stride_row + (col_begin + col) * problem.stride_col];
  }

  __device__ __forceinline__ bool kept(int row, int col) const {
    if (problem.mask == nullptr) return to_acc(at(row, col)) != AccOf<T>(0);
    return problem.mask[(row_begin + row) * problem.mask_stride_row + (col_begin + col) * problem.mask_stride_col] != 0;
  }

  // Calls visit(row, col) once for every element of the block, neighbouring lanes along W's own
  // fast dimension.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit&& visit) const {
    const int block_size = 1 << block_shift;
#pragma unroll 4
    for (int at = threadIdx.x; at < block_size * block_size; at += kConvertThreads) {
      const int slow = at >> block_shift;
      const int fast = at & (block_size - 1);
      const int row = along_rows ? fast : slow;
      const int col = along_rows ? slow : fast;
      if (row < rows && col < cols) visit(row, col);
    }
  }

  const ConvertProblem& problem;
  int32_t block_shift;
  int64_t row_begin;
  int64_t col_begin;
  int rows;  // of the block that lie in W
  int cols;
  bool along_rows;
};

}  // namespace csb::cuda
