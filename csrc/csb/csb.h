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
//  3. Every stored entry has a value and a block-local (row, col), all of a matrix in one of two
//     encodings. Codes: a 16-bit number an entry, a bijection of (row, col): the entry's element
//     offset in a dense block_size x block_size tile whose 8-element column groups are xor-swizzled
//     by the row (encode() below). Bitmap, where block_size is 64: 128 32-bit words a block, in which
//     the bit of (row, col) is set where an entry stands (bitmap_word() and bitmap_bit() below); in
//     blocks at the edge the bits beyond the matrix are 0.
//  4. No coordinate occurs twice; every coordinate lies inside the matrix, also in edge blocks.
//  5. Inside a block entries stand in the layout's named order. row_major, with codes: by row, then
//     column. quarter_major, with a bitmap: by quarter (col / 16), then row, then column.
//     The last blk_pad[b] entries of block b are padding: code 0 (no bit at all), value 0, gradient 0. A
//     count tells them, and no kernel reads them as entries.
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
  const uint16_t* codes;   // [blk_ptr[mb * kb]], 2-byte aligned; null where there is a bitmap
  const uint32_t* bitmap;  // [mb * kb][128], 16-byte aligned; null where there are codes

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

// Where the bit of (row, col) stands in the bitmap of a block. A word belongs to a 16 x 16 tile (tiles by quarter, then
// row) and holds two of its rows, r and r + 8; column 4 q + j of row r is bit 8 j + 2 q, of row r + 8 the bit above.
// What a lane of the tensor cores wants, four neighbours of both rows, is one bit in every byte after one shift.
CSB_HOST_DEVICE constexpr int32_t bitmap_word(int32_t row, int32_t col) {
  return (col >> 4) << 5 | (row >> 4) << 3 | (row & 7);
}

CSB_HOST_DEVICE constexpr int32_t bitmap_bit(int32_t row, int32_t col) {
  return (col & 3) << 3 | (col >> 2 & 3) << 1 | (row >> 3 & 1);
}

constexpr int32_t kBitmapWords = 128;

}  // namespace csb
