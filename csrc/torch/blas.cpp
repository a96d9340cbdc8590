#ifdef TORCH_CSB_WITH_CUDA

#include "torch/blas.h"

#include <library_types.h>
#include <torch/csrc/stable/c/shim.h>

// cuBLAS by its C names, with the values of its enumerations: a toolkit may come without its header.
// The library itself is the one that torch has loaded; weak, so that this one also loads without.
extern "C" {
__attribute__((weak)) int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                                       const void* a, cudaDataType type_a, int lda, const void* b, cudaDataType type_b,
                                       int ldb, const void* beta, void* c, cudaDataType type_c, int ldc, int compute,
                                       int algorithm);
__attribute__((weak)) int cublasGemmStridedBatchedEx(void* handle, int op_a, int op_b, int m, int n, int k,
                                                     const void* alpha, const void* a, cudaDataType type_a, int lda,
                                                     long long stride_a, const void* b, cudaDataType type_b, int ldb,
                                                     long long stride_b, const void* beta, void* c, cudaDataType type_c,
                                                     int ldc, long long stride_c, int batch, int compute,
                                                     int algorithm);
__attribute__((weak)) int cublasGetMathMode(void* handle, int* mode);
__attribute__((weak)) int cublasSetMathMode(void* handle, int mode);
__attribute__((weak)) AOTITorchError torch_get_current_cuda_blas_handle(void** handle);
}

namespace csb::border {
namespace {

constexpr int kNoTranspose = 0;         // CUBLAS_OP_N
constexpr int kTranspose = 1;           // CUBLAS_OP_T
constexpr int kComputeFloat32 = 68;     // CUBLAS_COMPUTE_32F
constexpr int kDefaultAlgorithm = -1;   // CUBLAS_GEMM_DEFAULT
constexpr int kDefaultMath = 0;         // CUBLAS_DEFAULT_MATH: no TF32
constexpr int kSumsStayInFloat32 = 16;  // CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION

void check_blas(int status, const char* what) { CSB_CHECK(status == 0, what, ": cuBLAS error ", status); }

// The handle is torch's, so its mode is put back.
class MathMode {
 public:
  explicit MathMode(void* handle) : handle_(handle) {
    check_blas(cublasGetMathMode(handle_, &before_), "math mode");
    check_blas(cublasSetMathMode(handle_, kDefaultMath | kSumsStayInFloat32), "math mode");
  }
  ~MathMode() { cublasSetMathMode(handle_, before_); }
  MathMode(const MathMode&) = delete;
  MathMode& operator=(const MathMode&) = delete;

 private:
  void* handle_;
  int before_ = kDefaultMath;
};

bool columns_are_lines(const Matrix& matrix) { return matrix.stride_row == 1 && matrix.stride_col >= matrix.rows; }
bool rows_are_lines(const Matrix& matrix) { return matrix.stride_col == 1 && matrix.stride_row >= matrix.cols; }

Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.cols, matrix.rows, matrix.stride_col, matrix.stride_row, matrix.stride_batch};
}

int operation(const Matrix& matrix) { return columns_are_lines(matrix) ? kNoTranspose : kTranspose; }
int line(const Matrix& matrix) {
  return static_cast<int>(columns_are_lines(matrix) ? matrix.stride_col : matrix.stride_row);
}

cudaDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return CUDA_R_32F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    case DType::kFloat16:
      return CUDA_R_16F;
    default:
      fail("expected float32, bfloat16 or float16 for a dense product");
  }
}

}  // namespace

bool is_blas_matrix(const Matrix& matrix) {
  const bool small = matrix.rows <= kInt32Max && matrix.cols <= kInt32Max && matrix.stride_row <= kInt32Max &&
                     matrix.stride_col <= kInt32Max;
  return small && matrix.rows > 0 && matrix.cols > 0 && (columns_are_lines(matrix) || rows_are_lines(matrix));
}

bool blas_available() {
  return cublasGemmEx != nullptr && cublasGemmStridedBatchedEx != nullptr && cublasGetMathMode != nullptr &&
         cublasSetMathMode != nullptr && torch_get_current_cuda_blas_handle != nullptr;
}

void multiply(const Matrix& c, const Matrix& a, const Matrix& b, int64_t batch, DType dtype, bool add) {
  // cuBLAS writes columns: a C of rows is the transpose of one, C^T = B^T . A^T.
  if (!columns_are_lines(c)) return multiply(transposed(c), transposed(b), transposed(a), batch, dtype, add);
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  const MathMode mode(handle);
  const cudaDataType type = type_of(dtype);
  const float alpha = 1;
  const float beta = add ? 1 : 0;
  const int m = static_cast<int>(c.rows);
  const int n = static_cast<int>(c.cols);
  const int k = static_cast<int>(a.cols);
  void* out = const_cast<void*>(c.data);
  if (batch == 1) {
    check_blas(cublasGemmEx(handle, operation(a), operation(b), m, n, k, &alpha, a.data, type, line(a), b.data, type,
                            line(b), &beta, out, type, line(c), kComputeFloat32, kDefaultAlgorithm),
               "dense product");
    return;
  }
  check_blas(
      cublasGemmStridedBatchedEx(handle, operation(a), operation(b), m, n, k, &alpha, a.data, type, line(a),
                                 a.stride_batch, b.data, type, line(b), b.stride_batch, &beta, out, type, line(c),
                                 c.stride_batch, static_cast<int>(batch), kComputeFloat32, kDefaultAlgorithm),
      "dense product");
}

}  // namespace csb::border

#endif  // TORCH_CSB_WITH_CUDA
