#pragma once

#include "csb/csb.h"

namespace csb {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

enum class Activation : int32_t { kNone, kRelu, kRelu6, kSilu, kGelu };

// An activation tensor as a features x columns matrix, whatever its memory format. Its non-feature
// dimensions, merged where memory allows, enumerate the columns; all strides count elements.
// Element (f, j) stands at f * stride_f + column_offset(j).
//   features last, [n, k]:            stride_f = 1,     size = {1, 1, n}, stride = {0, 0, row stride}
//   features first, [b, k, h * w]:    stride_f = h * w, size = {1, b, h * w}, stride = {0, k * h * w, 1}
struct DenseView {
  void* data;
  int64_t stride_f;
  int64_t columns;  // size[0] * size[1] * size[2]
  int64_t size[3];  // outermost first; every size >= 1 when columns > 0
  int64_t stride[3];

  CSB_HOST_DEVICE int64_t column_offset(int64_t j) const {
    if (size[0] == 1 && size[1] == 1) return j * stride[2];
    int64_t rest = j / size[2];
    return (rest / size[1]) * stride[0] + (rest % size[1]) * stride[1] + (j - rest * size[2]) * stride[2];
  }
};

// Y = act(op(W) . X + bias), op(W) = W (m x k) or its transpose (k x m).
//
// A work unit is a run of consecutive blocks: in row-major order when !transposed, in column-major
// order (position J * mb + I) when transposed. `units` holds the first position of each. An "output
// strip" is a block row (a block column when transposed), block_size features of Y. A strip that
// lies inside one unit is written to Y by that unit; of a strip that several units share, unit u
// writes its share of strip s to slot u + s of `partials` (a slot belongs to exactly one pair,
// because units and strips advance together), and join() adds the slots up in unit order.
struct SpmmProblem {
  CsbView w;
  DType dtype;  // of values, x, y and bias
  bool transposed;
  const void* values;    // [blk_ptr[mb * kb]]
  const int32_t* units;  // [num_units + 1]
  int32_t num_units;     // >= 1
  DenseView x;           // in_features() x columns, read only
  DenseView y;           // out_features() x columns, every element is written
  const void* bias;      // [out_features()], may be null
  Activation activation;
  void* partials;  // [num_units + strips(), block_size, columns] in the accumulator type
                   // (double for kFloat64, else float); null when no strip is shared

  CSB_HOST_DEVICE int32_t out_features() const { return transposed ? w.k : w.m; }
  CSB_HOST_DEVICE int32_t in_features() const { return transposed ? w.m : w.k; }
  CSB_HOST_DEVICE int32_t strips() const { return transposed ? w.kb : w.mb; }
  CSB_HOST_DEVICE int32_t blocks_per_strip() const { return transposed ? w.mb : w.kb; }
  // Number of the block at a position of the walk.
  CSB_HOST_DEVICE int32_t block_at(int32_t position) const {
    return transposed ? (position % w.mb) * w.kb + position / w.mb : position;
  }
};

// grad_values[e] = sum_j A[row(e), j] * B[col(e), j] for every entry e, 0 for padding.
struct SddmmProblem {
  CsbView w;
  DType dtype;           // of a, b and grad_values
  const int32_t* units;  // [num_units + 1], row-major positions
  int32_t num_units;
  DenseView a;            // m x columns, read only
  DenseView b;            // k x columns, read only
  void* grad_values;      // [blk_ptr[mb * kb]], every element is written
  int64_t entries;        // blk_ptr[mb * kb], padding included
  int32_t column_splits;  // >= 1: the columns are cut into this many runs, summed in order by join
  void* partials;         // [column_splits, entries] in the accumulator type; null when 1
};

// Between a dense W (element (i, j) at i * stride_row + j * stride_col) and CSB. An element is kept
// where mask is non-zero, or, without a mask, where the weight itself compares unequal to zero
// (NaN is kept).
struct ConvertProblem {
  CsbView w;    // counting: blk_ptr, blk_pad and codes may be null
  DType dtype;  // of dense and values
  void* dense;  // read by count and pack, written everywhere by unpack
  int64_t stride_row;
  int64_t stride_col;
  const uint8_t* mask;  // bool, same shape, may be null
  int64_t mask_stride_row;
  int64_t mask_stride_col;
  int32_t* counts;   // count: [mb * kb], kept elements of each block
  uint16_t* codes;   // pack and to_codes: [blk_ptr[mb * kb]], padding gets 0
  uint32_t* bitmap;  // pack_bitmap: [mb * kb][128]
  void* values;      // pack and pack_bitmap write (padding gets 0), unpack reads
};

}  // namespace csb
