#pragma once

#include "csb/integer.h"

namespace csb {

// Compressed Sparse Blocks (Buluc, Fineman, Frigo, Gilbert, Leiserson, SPAA 2009).
//
// W is m x k. It is cut into blocks of block_size x block_size; mb = ceil(m / block_size),
// kb = ceil(k / block_size). The contract, which CSBMatrix.validate() walks by the same numbers:
//
//  1. Blocks are numbered row-major: block (I, J) is number I * kb + J.
//  2. blk_ptr has mb * kb + 1 entries, is monotone, starts at 0 and ends at the number of stored
//     entries. Where block_size >= 16 every blk_ptr[b] is a multiple of 8, for vector loads.
//  3. Every stored entry has a value and a 16-bit code, a bijection of its block-local (row, col):
//     the entry's element offset in a dense block_size x block_size tile whose 8-element column
//     groups are xor-swizzled by the row (encode() below).
//  4. No coordinate occurs twice; every coordinate lies inside the matrix, also in edge blocks.
//  5. Inside a block entries stand in the layout's named order (row_major: by row, then column).
//     The last blk_pad[b] entries of block b are padding: code 0, value 0, gradient 0. A count
//     tells them, no code does, and no kernel reads them as entries.
//  6. values is the one trainable array, in entry order.
//  7. The transpose is the same arrays with the roles of row and column flipped.
//  8. Padding and plan together cost less than 5 % of the storage (8 % at 98 % sparsity) for
//     matrices of a million entries and more.
struct CsbView {
  int32_t m;
  int32_t k;
  int32_t block_shift;     // log2(block_size), 1 ... 8
  int32_t mb;              // block rows
  int32_t kb;              // block columns
  const int32_t* blk_ptr;  // [mb * kb + 1]
  const uint8_t* blk_pad;  // [mb * kb]
  const uint16_t* codes;   // [blk_ptr[mb * kb]], 2-byte aligned

  CSB_HOST_DEVICE int32_t block_size() const { return 1 << block_shift; }
  CSB_HOST_DEVICE int32_t num_blocks() const { return mb * kb; }
  CSB_HOST_DEVICE int32_t begin(int32_t block) const { return blk_ptr[block]; }
  CSB_HOST_DEVICE int32_t end(int32_t block) const { return blk_ptr[block + 1] - blk_pad[block]; }
};

// Which bits of the column a row flips: 8-element groups, at most 8 of them (a 128-byte row of
// 16-bit elements), none in blocks narrower than 16.
CSB_HOST_DEVICE constexpr int32_t swizzle(int32_t row, int32_t block_shift) {
  return block_shift < 4 ? 0 : (row & ((1 << (block_shift < 6 ? block_shift - 3 : 3)) - 1)) << 3;
}

CSB_HOST_DEVICE constexpr int32_t encode(int32_t row, int32_t col, int32_t block_shift) {
  return (row << block_shift) | (col ^ swizzle(row, block_shift));
}

CSB_HOST_DEVICE constexpr int32_t code_row(int32_t code, int32_t block_shift) { return code >> block_shift; }

CSB_HOST_DEVICE constexpr int32_t code_col(int32_t code, int32_t block_shift) {
  return (code & ((1 << block_shift) - 1)) ^ swizzle(code >> block_shift, block_shift);
}

}  // namespace csb
