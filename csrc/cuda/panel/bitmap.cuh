#pragma once

#include "csb/panel.h"
#include "cuda/device/bitmap.cuh"
#include "cuda/device/numeric.cuh"

namespace csb::cuda {

constexpr int kBitmapPanelThreads = 128;

// A block of the panel, its bitmap and a place for its values in shared memory.
template <typename Bits>
struct BitmapPanelBlock {
  using Quads = Vector<Bits, 4>;
  using Piece = Vector<uint32_t, 4>;
  static constexpr int kPerPiece = 16 / sizeof(Bits);

  struct Shared {
    alignas(16) uint32_t words[kBitmapWords];
    alignas(16) BitmapRows rows[kBitmapWords];
    Piece values[64 * 64 / kPerPiece];
  };

  const PanelProblem& problem;
  Shared& shared;
  int32_t row;  // of the panel
  int32_t col;
  int32_t number;
  int32_t begin;
  int32_t pieces;

  __device__ __forceinline__ BitmapPanelBlock(const PanelProblem& problem, Shared& shared)
      : problem(problem), shared(shared) {
    const int32_t block_row = blockIdx.x / problem.block_cols, block_col = blockIdx.x % problem.block_cols;
    row = 64 * block_row;
    col = 64 * block_col;
    number = (problem.block_row + block_row) * problem.w.kb + problem.block_col + block_col;
    begin = problem.w.begin(number);
    pieces = min_of((problem.w.begin(number + 1) - begin) / kPerPiece, 64 * 64 / kPerPiece);
    if (threadIdx.x < kBitmapWords / 4) {
      copy_async_16(shared.words + 4 * threadIdx.x,
                    problem.w.bitmap + int64_t{number} * kBitmapWords + 4 * threadIdx.x);
    }
    copy_async_commit();
  }

  __device__ __forceinline__ Piece* memory() const {
    return reinterpret_cast<Piece*>(static_cast<Bits*>(problem.values) + begin);
  }

  __device__ __forceinline__ void find() const {
    copy_async_wait<0>();
    __syncthreads();
    if (threadIdx.x < 32) find_rows(shared_address(shared.words), shared_address(shared.rows), threadIdx.x);
    __syncthreads();
  }

  static constexpr int kQuads = 64 * 16 / kBitmapPanelThreads;  // of a thread

  // Where this thread's i-th quad stands in the panel, null outside of it; neighbours have neighbouring ones.
  __device__ __forceinline__ Quads* place(int i) const {
    const int32_t quad_row = quad_row_of(i), quad_col = quad_col_of(i);
    if (row + quad_row >= problem.rows() || col + quad_col >= problem.ld) return nullptr;
    return reinterpret_cast<Quads*>(static_cast<Bits*>(problem.panel) + (row + quad_row) * problem.ld + col + quad_col);
  }

  __device__ __forceinline__ Quad quad(int i) const {
    const int32_t quad_row = quad_row_of(i), quad_col = quad_col_of(i);
    return quad_of(shared.rows[bitmap_word(quad_row, quad_col)], quad_col % 16 / 4, quad_row & 8);
  }

 private:
  static __device__ __forceinline__ int32_t quad_row_of(int i) { return (i * kBitmapPanelThreads + threadIdx.x) / 16; }
  static __device__ __forceinline__ int32_t quad_col_of(int i) { return threadIdx.x % 16 * 4; }
};

// Grid: x = block of the panel, row by row.
template <typename Bits>
__global__ void __launch_bounds__(kBitmapPanelThreads)
    unpack_bitmap_panel_kernel(const __grid_constant__ PanelProblem problem) {
  using Block = BitmapPanelBlock<Bits>;
  __shared__ typename Block::Shared shared;
  const Block block(problem, shared);
  for (int32_t i = threadIdx.x; i < block.pieces; i += kBitmapPanelThreads) {
    copy_async_16(shared.values + i, block.memory() + i);
  }
  copy_async_commit();
  block.find();
  const Bits* values = reinterpret_cast<const Bits*>(shared.values);
#pragma unroll 4
  for (int i = 0; i < Block::kQuads; ++i) {
    typename Block::Quads* to = block.place(i);
    if (to == nullptr) continue;
    const Quad quad = block.quad(i);
    typename Block::Quads four;
#pragma unroll
    for (int j = 0; j < 4; ++j) four.lane[j] = quad.has(j) ? values[quad.entry_of(j)] : Bits{0};
    *to = four;
  }
}

// Grid: x = block of the panel, row by row.
template <typename Bits>
__global__ void __launch_bounds__(kBitmapPanelThreads)
    sample_bitmap_panel_kernel(const __grid_constant__ PanelProblem problem) {
  using Block = BitmapPanelBlock<Bits>;
  __shared__ typename Block::Shared shared;
  const Block block(problem, shared);
  typename Block::Quads fours[Block::kQuads];  // on their way while entries are found
#pragma unroll
  for (int i = 0; i < Block::kQuads; ++i) {
    const typename Block::Quads* from = block.place(i);
    fours[i] = from == nullptr ? typename Block::Quads{} : *from;
  }
  for (int32_t i = threadIdx.x; i < block.pieces; i += kBitmapPanelThreads) shared.values[i] = {};
  block.find();
  Bits* values = reinterpret_cast<Bits*>(shared.values);
#pragma unroll
  for (int i = 0; i < Block::kQuads; ++i) {
    const Quad quad = block.quad(i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (quad.has(j)) values[quad.entry_of(j)] = fours[i].lane[j];
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < block.pieces; i += kBitmapPanelThreads) block.memory()[i] = shared.values[i];
}

}  // namespace csb::cuda
