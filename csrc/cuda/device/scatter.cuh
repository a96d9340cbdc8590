#pragma once

#include <cstdint>

#include "cuda/device/mma.cuh"

// Entries of a block on their way from memory into a dense 64 x 64 tile, eight at a time. A tile is named by
// its address in shared memory, an entry's place in it is its code.

namespace csb::cuda {

// By a whole warp.
__device__ __forceinline__ void clear_tile(uint32_t tile, int32_t lane_idx) {
#pragma unroll
  for (int i = 0; i < 64 * 64 * 2; i += 32 * 16) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};\n" ::"r"(tile + 16 * lane_idx + i), "r"(0) : "memory");
  }
  __syncwarp();
}

// Eight entries; they may reach into the padding at the end of the block, never beyond it. Where there
// are none the registers keep what they hold: a branch or a copy would wait for the load.
__device__ __forceinline__ void load_vector(uint4& into, const uint16_t* from, bool some) {
  asm volatile(
      "{\n"
      ".reg .pred some;\n"
      "setp.ne.b32 some, %5, 0;\n"
      "@some ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+r"(into.x), "+r"(into.y), "+r"(into.z), "+r"(into.w)
      : "l"(from), "r"(static_cast<int32_t>(some)));
}

__device__ __forceinline__ void repeat_first(uint4& pairs, int32_t count) {
  const uint32_t first = pairs.x & 0xffffu, both = first | first << 16;
  const auto keep = [both](uint32_t pair, int32_t left) {
    return left >= 2 ? pair : left == 1 ? (pair & 0xffffu) | (both & 0xffff0000u) : both;
  };
  pairs = {keep(pairs.x, count), keep(pairs.y, count - 2), keep(pairs.z, count - 4), keep(pairs.w, count - 6)};
}

// Padding has code 0, where an entry may stand: it becomes a copy of the vector's first entry.
__device__ __forceinline__ void replace_padding(uint4& codes, uint4& values, int32_t left) {
  if (left > 0 && left < 8) {
    repeat_first(codes, left);
    repeat_first(values, left);
  }
}

__device__ __forceinline__ uint16_t half(uint32_t pair, int which) {
  return static_cast<uint16_t>(which == 0 ? pair : pair >> 16);
}

// Stores eight elements, or none if left <= 0.
__device__ __forceinline__ void store_vector(uint32_t tile, const uint4& codes, const uint4& values, int32_t left) {
  const auto low = [tile](uint32_t pair) { return tile + 2 * (pair & 0xffffu); };
  const auto high = [tile](uint32_t pair) { return tile + (pair >> 15); };  // a code has 12 bits
  asm volatile(
      "{\n"
      ".reg .pred some;\n"
      "setp.gt.s32 some, %16, 0;\n"
      "@some st.shared.u16 [%0], %8;\n"
      "@some st.shared.u16 [%1], %9;\n"
      "@some st.shared.u16 [%2], %10;\n"
      "@some st.shared.u16 [%3], %11;\n"
      "@some st.shared.u16 [%4], %12;\n"
      "@some st.shared.u16 [%5], %13;\n"
      "@some st.shared.u16 [%6], %14;\n"
      "@some st.shared.u16 [%7], %15;\n"
      "}\n" ::"r"(low(codes.x)),
      "r"(high(codes.x)), "r"(low(codes.y)), "r"(high(codes.y)), "r"(low(codes.z)), "r"(high(codes.z)),
      "r"(low(codes.w)), "r"(high(codes.w)), "h"(half(values.x, 0)), "h"(half(values.x, 1)), "h"(half(values.y, 0)),
      "h"(half(values.y, 1)), "h"(half(values.z, 0)), "h"(half(values.z, 1)), "h"(half(values.w, 0)),
      "h"(half(values.w, 1)), "r"(left)
      : "memory");
}

}  // namespace csb::cuda
