#pragma once

#include "cpu/rows.h"
#include "cpu/spmv_kernel.h"

// One block times one tile of X, packed or where it lies. Kernel header: see kernel_prelude.h.
//
//   F: out[row] += value * in[col]        T: out[col] += value * in[row]        rows of `width` columns
//
// gather_rows   F. A row's entries are taken in pieces of a fixed size, whose sums stay in registers from piece to
// piece.
//               What is left of all rows is put into lists by its length first: a row ends after a random number of
//               entries, and a branch on it, mispredicted once a row, costs as much as eight entries.
// scatter_rows  T, long rows: the row's activations stay in registers.
// scatter_flat  T, short rows: no branch on where a row ends.
// column_block  F, a single column, in spmv_kernel.h.
namespace csb::cpu::CSB_CPU_ISA {

template <typename C>
using BlockKernel = void (*)(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* in,
                             uint32_t in_stride, C* out);

// Tiles of fewer columns are packed: the kernels take their rows to be adjacent.
constexpr int32_t kApartWidth = 32;

// The part of a tile's row that registers hold at once.
template <typename C, int kWidth>
struct Panel {
  static constexpr int kCount = kWidth < kLanes<C> ? kWidth : kLanes<C>;
  static constexpr int kVectors = kWidth / kCount < 8 ? kWidth / kCount : 8;  // of 16 registers
  static constexpr int kColumns = kVectors * kCount;
  // Sums that take turns, because each waits four cycles for itself.
  static constexpr int kTurns = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : 4;
  using V = std::conditional_t<kWidth == 1, C, Vector<C, kCount>>;
};

template <typename C>
CSB_INLINE const C* at_offset(const C* tile, uint32_t bytes) {
  return reinterpret_cast<const C*>(reinterpret_cast<const std::byte*>(tile) + bytes);
}

template <typename C>
CSB_INLINE C* at_offset(C* tile, uint32_t bytes) {
  return reinterpret_cast<C*>(reinterpret_cast<std::byte*>(tile) + bytes);
}

// Adds `pieces` times kEntries entries of one row to their row of out.
template <typename C, int kWidth, int kEntries>
CSB_INLINE void gather_pieces(const uint32_t* offsets, const C* values, uint32_t pieces, const C* in, C* out) {
  using P = Panel<C, kWidth>;
  using V = typename P::V;
  constexpr int kTurns = P::kTurns < kEntries ? P::kTurns : kEntries;
  for (int panel = 0; panel < kWidth; panel += P::kColumns) {
    V sum[kTurns][P::kVectors];
    CSB_UNROLL
    for (int i = 0; i < P::kVectors; ++i) {
      sum[0][i] = load_vector<V>(out + panel + i * P::kCount);
      CSB_UNROLL
      for (int turn = 1; turn < kTurns; ++turn) sum[turn][i] = V{};
    }
    const uint32_t* offset = offsets;
    const uint32_t* const end = offset + pieces * kEntries;
    for (const C* value = values; offset != end; offset += kEntries, value += kEntries) {
      CSB_UNROLL
      for (int piece = 0; piece < kEntries; ++piece) {
        const C* from = at_offset(in + panel, offset[piece]);
        CSB_UNROLL
        for (int i = 0; i < P::kVectors; ++i)
          sum[piece % kTurns][i] += load_vector<V>(from + i * P::kCount) * value[piece];
      }
    }
    CSB_UNROLL
    for (int i = 0; i < P::kVectors; ++i) {
      CSB_UNROLL
      for (int turn = 1; turn < kTurns; ++turn) sum[0][i] += sum[turn][i];
      store_vector(sum[0][i], out + panel + i * P::kCount);
    }
  }
}

// Ends of rows by their length: `row << 16 | first entry`.
template <int kLongest>
struct RowEnds {
  uint32_t count[kLongest] = {};
  uint32_t at[kLongest][256];
};

template <typename C, int kWidth, int kEntries, int kLongest>
CSB_INLINE void gather_ends(const RowEnds<kLongest>& ends, const uint32_t* offset, const C* values, const C* in,
                            C* out) {
  if constexpr (kEntries < kLongest) {
    for (uint32_t i = 0; i < ends.count[kEntries]; ++i) {
      const uint32_t end = ends.at[kEntries][i];
      const uint32_t first = end & 0xffffu;
      gather_pieces<C, kWidth, kEntries>(offset + first, values + first, 1, in, out + (end >> 16) * kWidth);
    }
    gather_ends<C, kWidth, kEntries + 1>(ends, offset, values, in, out);
  }
}

template <typename C, int kWidth, int kPiece>
void gather_rows(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* __restrict in,
                 uint32_t in_stride, C* __restrict out) {
  DecodedRows rows;
  for (int32_t done = 0; done < count; done += kChunkEntries) {
    const C* const chunk = values + done;
    const int32_t part = min_of(kChunkEntries, count - done);
    if (kWidth < kApartWidth || in_stride == kWidth) {  // a constant: a shift, not a product
      decode_rows(codes + done, chunk, part, block_shift, kWidth * sizeof(C), rows);
    } else {
      decode_rows(codes + done, chunk, part, block_shift, in_stride * sizeof(C), rows);
    }
    RowEnds<kPiece> ends;
    for (int32_t r = 0; r < rows.count; ++r) {
      const uint32_t start = rows.start[r];
      const uint32_t first = start & 0xffffu;
      const uint32_t entries = (rows.start[r + 1] & 0xffffu) - first;
      if (entries >= kPiece) {
        C* const to = out + (start >> 16) * kWidth;
        gather_pieces<C, kWidth, kPiece>(rows.offset + first, chunk + first, entries / kPiece, in, to);
      }
      const uint32_t left = entries % kPiece;
      ends.at[left][ends.count[left]++] = start + (entries - left);
    }
    gather_ends<C, kWidth, 1>(ends, rows.offset, chunk, in, out);
  }
}

constexpr int32_t kShortRow = 8;  // entries of the mean row below which pieces of 16 leave fewer ends

template <typename C, int kWidth>
void gather_block(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* in,
                  uint32_t in_stride, C* out) {
  const bool short_rows = count < (kShortRow << block_shift);
  (short_rows ? gather_rows<C, kWidth, 16> : gather_rows<C, kWidth, 8>)(codes, values, count, block_shift, in,
                                                                        in_stride, out);
}

template <typename C, int kWidth>
void scatter_rows(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* __restrict in,
                  uint32_t in_stride, C* __restrict out) {
  using P = Panel<C, kWidth>;
  using V = typename P::V;
  DecodedRows rows;
  for (int32_t done = 0; done < count; done += kChunkEntries) {
    const C* const chunk = values + done;
    decode_rows(codes + done, chunk, min_of(kChunkEntries, count - done), block_shift, kWidth * sizeof(C), rows);
    for (int32_t r = 0; r < rows.count; ++r) {
      const uint32_t begin = rows.start[r] & 0xffffu;
      const uint32_t end = rows.start[r + 1] & 0xffffu;
      for (int panel = 0; panel < kWidth; panel += P::kColumns) {
        const C* const from = in + int64_t{rows.start[r] >> 16} * in_stride + panel;
        V x[P::kVectors];
        CSB_UNROLL
        for (int i = 0; i < P::kVectors; ++i) x[i] = load_vector<V>(from + i * P::kCount);
        for (uint32_t e = begin; e < end; ++e) {
          C* const to = at_offset(out + panel, rows.offset[e]);
          V y[P::kVectors];
          CSB_UNROLL
          for (int i = 0; i < P::kVectors; ++i) y[i] = load_vector<V>(to + i * P::kCount) + x[i] * chunk[e];
          CSB_UNROLL
          for (int i = 0; i < P::kVectors; ++i) store_vector(y[i], to + i * P::kCount);
        }
      }
    }
  }
}

template <typename C, int kWidth>
void scatter_flat(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* __restrict in,
                  uint32_t in_stride, C* __restrict out) {
  using P = Panel<C, kWidth>;
  using V = typename P::V;
  DecodedEntries entries;
  for (int32_t done = 0; done < count; done += kChunkEntries) {
    const C* const chunk = values + done;
    const int32_t part = min_of(kChunkEntries, count - done);
    if (kWidth < kApartWidth || in_stride == kWidth) {  // a constant: a shift, not a product
      decode_entries(codes + done, chunk, part, block_shift, kWidth * sizeof(C), kWidth * sizeof(C), entries);
    } else {
      decode_entries(codes + done, chunk, part, block_shift, in_stride * sizeof(C), kWidth * sizeof(C), entries);
    }
    for (int32_t e = 0; e < part; ++e) {
      const C* const from = at_offset(in, entries.row[e]);
      C* const to = at_offset(out, entries.col[e]);
      CSB_UNROLL
      for (int i = 0; i < kWidth; i += P::kCount) {
        store_vector(V(load_vector<V>(to + i) + load_vector<V>(from + i) * chunk[e]), to + i);
      }
    }
  }
}

constexpr int32_t kLongRow = 32;  // entries of the mean row that repay its mispredicted end

template <typename C, int kWidth>
void scatter_block(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift, const C* in,
                   uint32_t in_stride, C* out) {
  const bool long_rows = count >= (kLongRow << block_shift) || Panel<C, kWidth>::kVectors >= 4;
  (long_rows ? scatter_rows<C, kWidth> : scatter_flat<C, kWidth>)(codes, values, count, block_shift, in, in_stride,
                                                                  out);
}

template <typename C, int kWidth>
BlockKernel<C> block_kernel(bool transposed) {
#if defined(__x86_64__) && CSB_VECTOR_BYTES == 64
  if constexpr (kWidth == 1 && std::is_same_v<C, float>) return transposed ? scatter_block<C, 1> : column_block;
#endif
  return transposed ? scatter_block<C, kWidth> : gather_block<C, kWidth>;
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
