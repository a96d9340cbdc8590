#pragma once

#include "csb/problem.h"

namespace csb {

// A rectangle of whole blocks of W beside its dense copy, the panel: element (i, j) of W stands at
// (i - block_row * block_size) * ld + (j - block_col * block_size). Elements of 2 or 4 bytes, blocks
// of 16 to 256.
struct PanelProblem {
  CsbView w;
  int32_t element_size;  // bytes, 2 or 4
  int32_t block_row;     // the first block row, and how many
  int32_t block_rows;
  int32_t block_col;
  int32_t block_cols;
  void* panel;   // [rows(), ld], 16-byte aligned
  int64_t ld;    // columns() rounded up to a multiple of 8
  void* values;  // [blk_ptr[mb * kb]], 16-byte aligned: unpack reads it, sample writes it

  CSB_HOST_DEVICE int64_t rows() const {
    return min_of<int64_t>(w.m - (int64_t{block_row} << w.block_shift), int64_t{block_rows} << w.block_shift);
  }
  CSB_HOST_DEVICE int64_t columns() const {
    return min_of<int64_t>(w.k - (int64_t{block_col} << w.block_shift), int64_t{block_cols} << w.block_shift);
  }
};

// What stands before and behind a dense product into a part of Y: `runs` runs of `length` neighbouring
// elements, `stride` elements apart. Every run holds length / columns_per_feature features.
struct EpilogueProblem {
  DType dtype;
  Activation activation;
  const void* bias;  // [length / columns_per_feature], may be null
  int64_t columns_per_feature;
  void* data;
  int64_t runs;
  int64_t length;
  int64_t stride;
};

}  // namespace csb
