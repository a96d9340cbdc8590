#pragma once

#include "csb/csb.h"
#include "cuda/device/mma.cuh"

// From a block's bitmap and its 16-bit values to operands of the tensor cores. A value is named by its address in
// shared memory, and whether an element has one is told by its bit: every element reads, and a byte permutation puts
// zeros where nothing should have been read. One value behind a block's last may be read so.

namespace csb::cuda {

// Two rows of a 16 x 16 tile, r and r + 8: a word of the bitmap, and how many of the block's entries stand in front of
// either row, the second in the high half.
struct alignas(8) BitmapRows {
  uint32_t bits;
  uint32_t starts;
};

constexpr uint32_t kFirstRow = 0x55555555u;

// By a whole warp: the rows of all words of a bitmap, from one shared-memory address to another, both on 16 bytes. They
// may be the same.
__device__ __forceinline__ void find_rows(uint32_t words, uint32_t rows, int32_t lane_idx) {
  constexpr unsigned kFullWarp = 0xffffffffu;
  // Two lanes share a tile, four words each; entries go by its first eight rows, then the others.
  uint32_t bits[4];
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(words + 16 * lane_idx)
               : "memory");
  __syncwarp();
  uint32_t before[5] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    before[i + 1] = before[i] + __popc(bits[i] & kFirstRow) + (__popc(bits[i] & ~kFirstRow) << 16);
  }
  const uint32_t other = __shfl_xor_sync(kFullWarp, before[4], 1);
  const uint32_t tile = before[4] + other;
  const uint32_t count = (tile & 0xffffu) + (tile >> 16);
  uint32_t end = count;
#pragma unroll
  for (int step = 2; step < 32; step *= 2) {
    const uint32_t left = __shfl_up_sync(kFullWarp, end, step);
    if (lane_idx >= step) end += left;
  }
  const uint32_t start = (end - count) * 0x10001u + (tile << 16) + (lane_idx % 2 == 0 ? 0 : other);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(rows + 32 * lane_idx + 8 * i), "r"(bits[i]),
                 "r"(start + before[i]), "r"(bits[i + 1]), "r"(start + before[i + 1])
                 : "memory");
  }
}

namespace bitmap {

// The bits of a tile's first row that belong to columns below 4 q.
__device__ __forceinline__ uint32_t quads_left(int32_t q) { return (((1u << 2 * q) - 1) & 0x55u) * 0x01010101u; }

__device__ __forceinline__ uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("dp4a.u32.u32 %0, %1, %2, %3;\n" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// From an address the one that many 16-bit values on, of the low and of the high half of a pair of counts.
__device__ __forceinline__ uint32_t advance_low(uint32_t address, uint32_t pair) {
  asm("dp2a.lo.u32.u32 %0, %1, %2, %0;\n" : "+r"(address) : "r"(pair), "r"(0x0002u));
  return address;
}

__device__ __forceinline__ uint32_t advance_high(uint32_t address, uint32_t pair) {
  asm("dp2a.lo.u32.u32 %0, %1, %2, %0;\n" : "+r"(address) : "r"(pair), "r"(0x0200u));
  return address;
}

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

__device__ __forceinline__ uint32_t load_16(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u16 %0, [%1];\n" : "=r"(value) : "r"(address));
  return value;
}

// The values at two addresses, or zeros: a selector's byte is 0x10 (0x54 of the second) where there is a value.
__device__ __forceinline__ uint32_t load_pair(uint32_t first, uint32_t second, uint32_t selector) {
  return permute(load_16(first), load_16(second), selector);
}

// Two selectors of four bits, each in a byte of its own, and of the same one place higher.
__device__ __forceinline__ uint32_t selectors_of_ones(uint32_t bits) { return 0x76327632u - 0x22u * bits; }
__device__ __forceinline__ uint32_t selectors_of_twos(uint32_t bits) { return 0x76327632u - 0x11u * bits; }

}  // namespace bitmap

// Columns 4 q ... 4 q + 3 of one of a tile's rows.
struct Quad {
  int32_t entry;  // of the block, the first one at or behind these columns
  uint32_t bits;  // bit 8 j: column 4 q + j has an entry

  __device__ __forceinline__ bool has(int32_t j) const { return bits >> 8 * j & 1; }
  __device__ __forceinline__ int32_t entry_of(int32_t j) const { return entry + __popc(bits & ((1u << 8 * j) - 1)); }
};

// second: of the row r + 8.
__device__ __forceinline__ Quad quad_of(const BitmapRows& rows, int32_t q, bool second) {
  const uint32_t bits = rows.bits >> (second ? 1 : 0);
  const uint32_t start = second ? rows.starts >> 16 : rows.starts & 0xffffu;
  return {static_cast<int32_t>(start + __popc(bits & bitmap::quads_left(q))), bits >> 2 * q & 0x01010101u};
}

// A lane's way to columns 4 t ... 4 t + 3 of a tile's rows.
struct RowExpander {
  uint32_t shift;
  uint32_t left;  // bits of the first row that stand in front of the lane's

  __device__ __forceinline__ explicit RowExpander(int32_t t) : shift(2 * t), left(bitmap::quads_left(t)) {}

  // With lane 4 g + t and rows g and g + 8: operand A of multiply_add(), whose k runs through columns 4 t, 4 t + 1
  // where the instruction has 2 t, 2 t + 1, and 4 t + 2, 4 t + 3 where it has 2 t + 8, 2 t + 9.
  __device__ __forceinline__ void expand(uint32_t (&a)[4], const BitmapRows& rows, uint32_t values) const {
    using namespace bitmap;
    const uint32_t bits = rows.bits >> shift;
    const uint32_t first = bits & 0x01010101u, second = bits & 0x02020202u;
    const uint32_t f0 = advance_low(values, rows.starts) + 2 * __popc(rows.bits & left);
    const uint32_t s0 = advance_high(values, rows.starts) + 2 * __popc(rows.bits & left << 1);
    const uint32_t f1 = dot4(first, 0x00000002u, f0), s1 = dot4(second, 0x00000001u, s0);
    const uint32_t f2 = dot4(first, 0x00000202u, f0), s2 = dot4(second, 0x00000101u, s0);
    const uint32_t f3 = dot4(first, 0x00020202u, f0), s3 = dot4(second, 0x00010101u, s0);
    const uint32_t select_first = selectors_of_ones(first), select_second = selectors_of_twos(second);
    a[0] = load_pair(f0, f1, select_first);
    a[2] = load_pair(f2, f3, select_first >> 16);
    a[1] = load_pair(s0, s1, select_second);
    a[3] = load_pair(s2, s3, select_second >> 16);
  }
};

// A lane's way to columns 2 g and 2 g + 1 of a tile's rows.
struct ColumnExpander {
  uint32_t shift;
  uint32_t left;

  __device__ __forceinline__ explicit ColumnExpander(int32_t g) : shift(16 * (g % 2) + g / 2 * 2) {
    left = bitmap::quads_left(g / 2) | (g % 2 == 0 ? 0 : 0x00000101u << g / 2 * 2);
  }

  // With lane 4 g + t and the rows of words 2 t and 2 t + 1: operand A of the transposed tile, whose row g is column 2
  // g and row g + 8 column 2 g + 1.
  __device__ __forceinline__ void expand(uint32_t (&a)[4], const BitmapRows& even, const BitmapRows& odd,
                                         uint32_t values) const {
    using namespace bitmap;
    const uint32_t bits = permute(even.bits >> shift, odd.bits >> shift, 0x5140);
    const uint32_t first = bits & 0x01010101u, second = bits & 0x02020202u;
    const uint32_t fe = advance_low(values, even.starts) + 2 * __popc(even.bits & left);
    const uint32_t fo = advance_low(values, odd.starts) + 2 * __popc(odd.bits & left);
    const uint32_t se = advance_high(values, even.starts) + 2 * __popc(even.bits & left << 1);
    const uint32_t so = advance_high(values, odd.starts) + 2 * __popc(odd.bits & left << 1);
    const uint32_t select_first = selectors_of_ones(first), select_second = selectors_of_twos(second);
    a[0] = load_pair(fe, fo, select_first);
    a[1] = load_pair(dot4(first, 0x00000002u, fe), dot4(first, 0x00000200u, fo), select_first >> 16);
    a[2] = load_pair(se, so, select_second);
    a[3] = load_pair(dot4(second, 0x00000001u, se), dot4(second, 0x00000100u, so), select_second >> 16);
  }
};

}  // namespace csb::cuda
