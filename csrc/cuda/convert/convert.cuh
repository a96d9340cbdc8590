#pragma once

#include "cuda/convert/dense_block.cuh"

namespace csb::cuda {

constexpr int kMaxBlockSize = 256;
constexpr int kMaskWords = kMaxBlockSize / 32;

// Sum of a count of every thread.
__device__ __forceinline__ int32_t sum_of_threads(int32_t count, int32_t* warp_sums) {
  for (int step = 16; step > 0; step /= 2) count += __shfl_down_sync(0xffffffffu, count, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = count;
  __syncthreads();
  int32_t sum = 0;
  for (int warp = 0; warp < kConvertThreads / 32; ++warp) sum += warp_sums[warp];
  return sum;
}

// Grid: x = block of W.
template <typename T>
__global__ void __launch_bounds__(kConvertThreads) count_kernel(const __grid_constant__ ConvertProblem problem) {
  __shared__ int32_t warp_sums[kConvertThreads / 32];
  const DenseBlock<T> block(problem);
  int32_t count = 0;
  block.for_each([&](int row, int col) { count += block.kept(row, col); });
  const int32_t sum = sum_of_threads(count, warp_sums);
  if (threadIdx.x == 0) problem.counts[blockIdx.x] = sum;
}

// Grid: x = block of W.
//
// Row-major order without a sort: a bit for every kept element, then an element's place is the
// number of bits in the rows above plus those on its left.
template <typename T>
__global__ void __launch_bounds__(kConvertThreads) pack_kernel(const __grid_constant__ ConvertProblem problem) {
  __shared__ uint32_t bits[kMaxBlockSize][kMaskWords];
  __shared__ int32_t row_starts[kMaxBlockSize];
  __shared__ int32_t warp_sums[kConvertThreads / 32];
  static_assert(kMaxBlockSize <= kConvertThreads, "one thread counts one row");
  const DenseBlock<T> block(problem);
  const int thread = threadIdx.x;
  const int lane_idx = thread % 32;
  const int warp_idx = thread / 32;

  // Phase 1: which elements are kept.
  for (int i = thread; i < kMaxBlockSize * kMaskWords; i += kConvertThreads) (&bits[0][0])[i] = 0;
  __syncthreads();
  block.for_each([&](int row, int col) {
    if (block.kept(row, col)) atomicOr(&bits[row][col / 32], 1u << (col % 32));
  });
  __syncthreads();

  // Phase 2: where each row begins.
  int32_t count = 0;
  for (int word = 0; word < kMaskWords; ++word) count += __popc(bits[thread][word]);
  int32_t sum = count;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane_idx >= step) sum += other;
  }
  if (lane_idx == 31) warp_sums[warp_idx] = sum;
  __syncthreads();
  int32_t total = 0;
  for (int warp = 0; warp < kConvertThreads / 32; ++warp) {
    if (warp < warp_idx) sum += warp_sums[warp];
    total += warp_sums[warp];
  }
  row_starts[thread] = sum - count;
  __syncthreads();

  // Phase 3: entries. The bound holds the store inside the block should count() have seen other data.
  const int64_t begin = problem.w.blk_ptr[blockIdx.x];
  const int64_t end = problem.w.blk_ptr[blockIdx.x + 1];
  T* values = static_cast<T*>(problem.values);
  block.for_each([&](int row, int col) {
    const uint32_t word = bits[row][col / 32];
    if ((word >> (col % 32) & 1) == 0) return;
    int64_t entry = begin + row_starts[row] + __popc(word & ((1u << (col % 32)) - 1));
    for (int before = 0; before < col / 32; ++before) entry += __popc(bits[row][before]);
    if (entry >= end) return;
    values[entry] = block.at(row, col);
    problem.codes[entry] = static_cast<uint16_t>(encode(row, col, block.block_shift));
  });

  // Phase 4: padding.
  for (int64_t entry = begin + total + thread; entry < end; entry += kConvertThreads) {
    values[entry] = from_acc<T>(AccOf<T>(0));
    problem.codes[entry] = 0;
  }
}

// Grid: x = block of W.
template <typename T>
__global__ void __launch_bounds__(kConvertThreads) unpack_kernel(const __grid_constant__ ConvertProblem problem) {
  const DenseBlock<T> block(problem);
  block.for_each([&](int row, int col) { block.at(row, col) = from_acc<T>(AccOf<T>(0)); });
  __syncthreads();  // also orders the zeros before the values in memory
  const T* values = static_cast<const T*>(problem.values);
  const int64_t end = problem.w.end(blockIdx.x);
  for (int64_t entry = int64_t(problem.w.begin(blockIdx.x)) + threadIdx.x; entry < end; entry += kConvertThreads) {
    const int32_t code = problem.w.codes[entry];
    block.at(code_row(code, block.block_shift), code_col(code, block.block_shift)) = values[entry];
  }
}

}  // namespace csb::cuda
