#pragma once

#include "torch/checks.h"

// Dense products on the GPU: cuBLAS through the handle of torch, and so with torch's workspace on
// torch's stream. Called without torch in between because torch.mm sums 16-bit products in 16 bits
// and float32 ones in TF32 wherever a global setting allows it, the first of them by default.
namespace csb::border {

// `batch` matrices; element (i, j) of matrix b stands at b * stride_batch + i * stride_row + j * stride_col.
struct Matrix {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride_row;
  int64_t stride_col;
  int64_t stride_batch;
};

// Whether cuBLAS can take the matrix as it lies: one stride is 1, the other spans a whole line.
bool is_blas_matrix(const Matrix& matrix);

// False where this process has no cuBLAS that the linker could find.
bool blas_available();

// C = A . B + (add ? C : 0), every matrix of one batch, accumulated in float32. `dtype` is that of all
// three: kFloat32, kBFloat16 or kFloat16.
void multiply(const Matrix& c, const Matrix& a, const Matrix& b, int64_t batch, DType dtype, bool add);

}  // namespace csb::border
