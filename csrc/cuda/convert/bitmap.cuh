#pragma once

#include "cuda/convert/dense_block.cuh"
#include "cuda/device/bitmap.cuh"

namespace csb::cuda {

// The bitmap of one block in shared memory, and where its entries stand.
struct SharedBitmap {
  alignas(16) uint32_t words[kBitmapWords];
  alignas(16) BitmapRows rows[kBitmapWords];

  // By all threads, once words are there.
  __device__ __forceinline__ void find() {
    __syncthreads();
    if (threadIdx.x < 32) find_rows(shared_address(words), shared_address(rows), threadIdx.x);
    __syncthreads();
  }

  __device__ __forceinline__ Quad quad(int row, int col) const {
    return quad_of(rows[bitmap_word(row, col)], col % 16 / 4, row & 8);
  }

  __device__ __forceinline__ int32_t count() const {
    const BitmapRows& last = rows[kBitmapWords - 1];
    return static_cast<int32_t>(last.starts >> 16) + __popc(last.bits & ~kFirstRow);
  }
};

// Grid: x = block of W. Bounds hold every store inside the block should count() have seen other data.
template <typename T>
__global__ void __launch_bounds__(kConvertThreads) pack_bitmap_kernel(const __grid_constant__ ConvertProblem problem) {
  __shared__ SharedBitmap shared;
  const DenseBlock<T> block(problem);
  for (int i = threadIdx.x; i < kBitmapWords; i += kConvertThreads) shared.words[i] = 0;
  __syncthreads();
  block.for_each([&](int row, int col) {
    if (block.kept(row, col)) atomicOr(&shared.words[bitmap_word(row, col)], 1u << bitmap_bit(row, col));
  });
  shared.find();

  const int64_t begin = problem.w.blk_ptr[blockIdx.x];
  const int64_t end = problem.w.blk_ptr[blockIdx.x + 1];
  T* values = static_cast<T*>(problem.values);
  block.for_each([&](int row, int col) {
    const Quad quad = shared.quad(row, col);
    const int64_t entry = begin + quad.entry_of(col % 4);
    if (quad.has(col % 4) && entry < end) values[entry] = block.at(row, col);
  });
  for (int64_t entry = begin + shared.count() + threadIdx.x; entry < end; entry += kConvertThreads) {
    values[entry] = from_acc<T>(AccOf<T>(0));
  }
  for (int i = threadIdx.x; i < kBitmapWords; i += kConvertThreads) {
    problem.bitmap[int64_t{blockIdx.x} * kBitmapWords + i] = shared.words[i];
  }
}

__device__ __forceinline__ void read_bitmap(const CsbView& w, SharedBitmap& shared) {
  for (int i = threadIdx.x; i < kBitmapWords; i += static_cast<int>(blockDim.x)) {
    shared.words[i] = w.bitmap[int64_t{blockIdx.x} * kBitmapWords + i];
  }
  shared.find();
}

// Grid: x = block of W.
template <typename T>
__global__ void __launch_bounds__(kConvertThreads)
    unpack_bitmap_kernel(const __grid_constant__ ConvertProblem problem) {
  __shared__ SharedBitmap shared;
  const DenseBlock<T> block(problem);
  read_bitmap(problem.w, shared);
  const T* values = static_cast<const T*>(problem.values) + problem.w.begin(blockIdx.x);
  block.for_each([&](int row, int col) {
    const Quad quad = shared.quad(row, col);
    block.at(row, col) = quad.has(col % 4) ? values[quad.entry_of(col % 4)] : from_acc<T>(AccOf<T>(0));
  });
}

}  // namespace csb::cuda
