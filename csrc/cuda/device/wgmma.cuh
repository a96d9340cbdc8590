#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device/mma.cuh"

// The tensor cores of Hopper, fed from shared memory by four warps together (sm_90a).

namespace csb::cuda {

// How a 16-bit operand in the 128-byte swizzle (tile_offset<64>() in warp_tile.cuh) stands in shared
// memory, at a multiple of 1024 bytes. Its rows are 64 elements wide; eight rows are a group. With
// kRowsAlongK a row is one step of the sum, and `wide_stride` bytes lie between tiles of 64 columns;
// else a row is one row (A) or column (B) of the product.
template <bool kRowsAlongK>
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t tile, uint32_t wide_stride) {
  constexpr uint64_t kSwizzle128 = 1;
  constexpr uint64_t kGroupBytes = 8 * 64 * 2;
  const uint64_t address = (tile >> 4) & 0x3fff;  // without the thread block's rank in its cluster
  const uint64_t leading = kRowsAlongK ? wide_stride >> 4 : 1;
  return address | leading << 16 | (kGroupBytes >> 4) << 32 | kSwizzle128 << 62;
}

// The same operand 16 steps of the sum further on.
template <bool kRowsAlongK>
__device__ __forceinline__ constexpr uint64_t descriptor_step() {
  return (kRowsAlongK ? 16 * 64 * 2 : 16 * 2) >> 4;
}

// Orders this thread's accesses to the sums before the products that follow.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Returns when at most kPending committed groups of products are still under way.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

#define CSB_SUMS_8(i)                                                                                     \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define CSB_SUMS_32(i) CSB_SUMS_8(i), CSB_SUMS_8(i + 8), CSB_SUMS_8(i + 16), CSB_SUMS_8(i + 24)

// sum (64 x 128, float) += A (64 x 16) . B (16 x 128), for the four warps of a warpgroup together. With
// lane 4 g + t of warp w, sum[4 j + e] is row 16 w + 8 (e / 2) + g, column 8 j + 2 t + e % 2.
template <typename Scalar, bool kARowsAlongK, bool kBRowsAlongK>
__device__ __forceinline__ void multiply_add_128(float (&sum)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<Scalar, __nv_bfloat16>) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, %66, %67;\n"
        : CSB_SUMS_32(0), CSB_SUMS_32(32)
        : "l"(a), "l"(b), "n"(int(kARowsAlongK)), "n"(int(kBRowsAlongK)));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, %66, %67;\n"
        : CSB_SUMS_32(0), CSB_SUMS_32(32)
        : "l"(a), "l"(b), "n"(int(kARowsAlongK)), "n"(int(kBRowsAlongK)));
  }
}

#undef CSB_SUMS_32
#undef CSB_SUMS_8

}  // namespace csb::cuda
