#pragma once

#include "cpu/numeric.h"
#include "cpu/spmv_kernel.h"

// One block times one packed tile. Kernel header: see kernel_prelude.h.
//
//   F: out[row] += value * in[col]        T: out[col] += value * in[row]        rows of `width` columns
//
// Ways to walk the entries (row-major in the block):
//   scatter_block  adds every entry to its output row in memory. Entries that follow each other in T meet different
//                  output rows, so nothing waits. In F they meet the same one, so F walks several parts of the block
//                  side by side.
//   row_block      F, wide tiles, long rows: keeps the output row in registers for as long as the row lasts. A row's
//                  end is a mispredicted branch, which short rows don't repay.
//   turns_block    the same for narrow tiles and longer rows yet.
//   column_block   a single column, in spmv_kernel.h.
namespace csb::cpu::CSB_CPU_ISA {

template <typename C>
using BlockKernel = void (*)(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* in,
                             C* out);

template <typename C, int kWidth>
constexpr int kTileLanes = kWidth < kLanes<C> ? kWidth : kLanes<C>;

template <typename C, int kWidth, bool kTransposed>
CSB_INLINE void scatter_entry(uint32_t code, C value, int32_t block_shift, uint32_t swizzle_mask, const C* in, C* out) {
  const uint32_t row = code >> block_shift;
  const uint32_t col = (code & ((1u << block_shift) - 1)) ^ ((row & swizzle_mask) << 3);
  const C* from = in + (kTransposed ? row : col) * kWidth;
  C* to = out + (kTransposed ? col : row) * kWidth;
  if constexpr (kWidth == 1) {
    *to += value * *from;
  } else {
    constexpr int kCount = kTileLanes<C, kWidth>;
    using V = Vector<C, kCount>;
    CSB_UNROLL
    for (int i = 0; i < kWidth; i += kCount) {
      store_vector(load_vector<V>(to + i) + load_vector<V>(from + i) * value, to + i);
    }
  }
}

template <typename C, int kWidth, bool kTransposed, int kParts>
void scatter_block(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* __restrict in,
                   C* __restrict out) {
  const uint32_t swizzle_mask = static_cast<uint32_t>(swizzle(7, block_shift)) >> 3;
  const int32_t part = count / kParts;
  for (int32_t e = 0; e < part; ++e) {
    CSB_UNROLL
    for (int s = 0; s < kParts; ++s) {
      scatter_entry<C, kWidth, kTransposed>(codes[e + s * part], values[e + s * part], block_shift, swizzle_mask, in,
                                            out);
    }
  }
  for (int32_t e = part * kParts; e < count; ++e) {
    scatter_entry<C, kWidth, kTransposed>(codes[e], values[e], block_shift, swizzle_mask, in, out);
  }
}

template <typename C, int kWidth>
void row_block(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* __restrict in,
               C* __restrict out) {
  constexpr int kCount = kTileLanes<C, kWidth>;
  constexpr int kVectors = kWidth / kCount < 8 ? kWidth / kCount : 8;  // of 16 registers
  constexpr int kPanel = kVectors * kCount;
  using V = Vector<C, kCount>;
  const uint32_t col_mask = (1u << block_shift) - 1;
  int32_t begin = 0;
  while (begin < count) {
    const uint32_t row = codes[begin] >> block_shift;
    const uint32_t flip = static_cast<uint32_t>(swizzle(static_cast<int32_t>(row), block_shift));
    int32_t end = begin + 1;
    while (end < count && (static_cast<uint32_t>(codes[end]) >> block_shift) == row) ++end;
    for (int panel = 0; panel < kWidth; panel += kPanel) {
      C* to = out + row * kWidth + panel;
      const C* from = in + panel;
      V sum[kVectors];
      CSB_UNROLL
      for (int i = 0; i < kVectors; ++i) sum[i] = load_vector<V>(to + i * kCount);
      for (int32_t e = begin; e < end; ++e) {
        const C* x = from + ((codes[e] & col_mask) ^ flip) * kWidth;
        const C value = values[e];
        CSB_UNROLL
        for (int i = 0; i < kVectors; ++i) sum[i] += load_vector<V>(x + i * kCount) * value;
      }
      CSB_UNROLL
      for (int i = 0; i < kVectors; ++i) store_vector(sum[i], to + i * kCount);
    }
    begin = end;
  }
}

// The same for narrow tiles, where one row of sums would wait for itself: four take turns.
template <typename C, int kWidth>
void turns_block(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* __restrict in,
                 C* __restrict out) {
  static_assert(kWidth <= kLanes<C> && kWidth > 1, "a row of the tile is one vector");
  using V = Vector<C, kWidth>;
  const uint32_t col_mask = (1u << block_shift) - 1;
  int32_t e = 0;
  while (e < count) {
    const uint32_t row = codes[e] >> block_shift;
    const uint32_t flip = static_cast<uint32_t>(swizzle(static_cast<int32_t>(row), block_shift));
    const auto term = [&](int32_t at) {
      return load_vector<V>(in + ((codes[at] & col_mask) ^ flip) * kWidth) * values[at];
    };
    V sum[4] = {};
    // Rows ascend: where the fourth entry is of this row, all four are.
    for (; e + 4 <= count && static_cast<uint32_t>(codes[e + 3]) >> block_shift == row; e += 4) {
      CSB_UNROLL
      for (int turn = 0; turn < 4; ++turn) sum[turn] += term(e + turn);
    }
    for (; e < count && static_cast<uint32_t>(codes[e]) >> block_shift == row; ++e) sum[0] += term(e);
    C* to = out + row * kWidth;
    store_vector(load_vector<V>(to) + ((sum[0] + sum[1]) + (sum[2] + sum[3])), to);
  }
}

constexpr int kForwardParts = 4;  // covers the latency of a load, multiply, add and store
constexpr int32_t kLongRow = 16;  // entries
constexpr int32_t kTurnsRow = 32;

template <typename C, int kWidth>
void forward_block(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* in, C* out) {
  if constexpr (kWidth >= 32) {
    if (count >= (kLongRow << block_shift)) {
      row_block<C, kWidth>(codes, values, count, block_shift, in, out);
      return;
    }
  }
  if constexpr (kWidth > 1 && kWidth <= kLanes<C>) {
    if (count >= (kTurnsRow << block_shift)) {
      turns_block<C, kWidth>(codes, values, count, block_shift, in, out);
      return;
    }
  }
  scatter_block<C, kWidth, false, kForwardParts>(codes, values, count, block_shift, in, out);
}

template <typename C, int kWidth>
BlockKernel<C> block_kernel(bool transposed) {
#if defined(__x86_64__) && CSB_VECTOR_BYTES == 64
  if constexpr (kWidth == 1 && std::is_same_v<C, float>) return transposed ? column_block<true> : column_block<false>;
#endif
  return transposed ? scatter_block<C, kWidth, true, 1> : forward_block<C, kWidth>;
}

template <typename C>
BlockKernel<C> choose_block_kernel(int32_t width, bool transposed) {
  switch (width) {
    case 1:
      return block_kernel<C, 1>(transposed);
    case 4:
      return block_kernel<C, 4>(transposed);
    case 8:
      return block_kernel<C, 8>(transposed);
    case 16:
      return block_kernel<C, 16>(transposed);
    case 32:
      return block_kernel<C, 32>(transposed);
    case 64:
      return block_kernel<C, 64>(transposed);
  }
  __builtin_trap();
}

}  // namespace csb::cpu::CSB_CPU_ISA
