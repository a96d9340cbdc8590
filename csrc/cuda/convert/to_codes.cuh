#pragma once

#include "cuda/device/bitmap.cuh"
#include "cuda/device/numeric.cuh"

namespace csb::cuda {

constexpr int kToCodesWarps = 4;

// What a warp expands a block in: codes leave it in whole lines.
struct ToCodesShared {
  alignas(16) BitmapRows rows[kBitmapWords];
  Vector<uint16_t, 8> codes[64 * 64 / 8];
};

// Lists the entries among 16 columns of a row, whose bits stand in every second place of `bits`.
__device__ __forceinline__ void list_codes(uint16_t* list, uint32_t bits, int32_t row, int32_t first_col) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int32_t code = encode(row, first_col + 4 * q, 6);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (bits >> (8 * j + 2 * q) & 1) *list++ = static_cast<uint16_t>(code + j);
    }
  }
}

// A warp takes a block of W alone. Grid: x = kToCodesWarps blocks.
__global__ void __launch_bounds__(32 * kToCodesWarps) to_codes_kernel(const __grid_constant__ ConvertProblem problem) {
  __shared__ ToCodesShared memory[kToCodesWarps];
  const int32_t warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  const int64_t block = int64_t{blockIdx.x} * kToCodesWarps + warp_idx;
  if (block >= problem.w.num_blocks()) return;
  ToCodesShared& shared = memory[warp_idx];
  const int32_t begin = problem.w.blk_ptr[block];
  const int32_t stored = min_of(problem.w.blk_ptr[block + 1] - begin, 64 * 64);
  copy_async_16(reinterpret_cast<unsigned char*>(shared.rows) + 16 * lane_idx,
                problem.w.bitmap + block * kBitmapWords + 4 * lane_idx);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  find_rows(shared_address(shared.rows), shared_address(shared.rows), lane_idx);
  __syncwarp();
  uint16_t* list = shared.codes[0].lane;
#pragma unroll 1
  for (int word = lane_idx; word < kBitmapWords; word += 32) {
    const BitmapRows rows = shared.rows[word];
    const int32_t row = (word >> 3 & 3) * 16 + (word & 7), col = word >> 5 << 4;
    list_codes(list + (rows.starts & 0xffffu), rows.bits, row, col);
    list_codes(list + (rows.starts >> 16), rows.bits >> 1, row + 8, col);
  }
  const BitmapRows& last = shared.rows[kBitmapWords - 1];
  const int32_t count = static_cast<int32_t>(last.starts >> 16) + __popc(last.bits & ~kFirstRow);
  if (count + lane_idx < stored) list[count + lane_idx] = 0;  // fewer than eight are padding
  __syncwarp();
  auto* to = reinterpret_cast<Vector<uint16_t, 8>*>(problem.codes + begin);
  for (int32_t i = lane_idx; i < stored / 8; i += 32) to[i] = shared.codes[i];
}

}  // namespace csb::cuda
