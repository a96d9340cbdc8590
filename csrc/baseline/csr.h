#pragma once

#include "csb/problem.h"

// Compressed Sparse Rows, to compare with. Nothing outside this folder and the border uses it.
namespace csb::baseline {

// W is m x k. Row i holds the entries [row_ptr[i], row_ptr[i + 1]), in ascending order of columns.
struct CsrView {
  int32_t m;
  int32_t k;
  int32_t nnz;
  const int32_t* row_ptr;    // [m + 1]
  const int32_t* col_ind;    // [nnz]
  const int32_t* row_order;  // [m], every row once, longest first
};

// Y = W . X. Both dense matrices are row-major without gaps: features first.
struct CsrSpmmProblem {
  CsrView w;
  DType dtype;         // of values, x and y; sums are double for kFloat64, else float
  const void* values;  // [nnz]
  int64_t n;           // columns
  const void* x;       // [k, n]
  void* y;             // [m, n], every element is written
  void* scratch;       // merge only: merge_scratch_bytes(), 16-byte aligned; else null
};

// grad_values[e] = sum_j A[row(e), j] * B[col(e), j] for every entry e.
struct CsrSddmmProblem {
  CsrView w;
  DType dtype;  // of a, b and grad_values
  int64_t n;
  const void* a;      // [m, n]
  const void* b;      // [k, n]
  void* grad_values;  // [nnz], every element is written
};

}  // namespace csb::baseline
