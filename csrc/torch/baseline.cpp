// The CSR baselines: tensors in, checked problem structs out, and their kernels on CPU and CUDA. Index values are
// trusted here; they were validated where they entered (CSRMatrix).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "baseline/cpu/row_split.h"
#include "baseline/cpu/sddmm.h"
#include "torch/checks.h"
#ifdef TORCH_CSB_WITH_CUDA
#include "baseline/merge/merge.h"
#include "baseline/row_split/row_split.h"
#include "baseline/row_swizzle/row_swizzle.h"
#include "baseline/sddmm/sddmm.h"
#include "torch/launch.h"
#endif

namespace csb::border {
namespace {

using baseline::CsrSddmmProblem;
using baseline::CsrSpmmProblem;
using baseline::CsrView;

// A problem and the tensor that it writes.
struct CsrSpmmCall {
  CsrSpmmProblem problem;
  Tensor y;
};

struct CsrSddmmCall {
  CsrSddmmProblem problem;
  Tensor grad_values;
};

// The pattern without its number of columns, which it doesn't hold.
CsrView pattern_of(const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order, const Device& device,
                   const char* first) {
  check_device(row_ptr, "row_ptr", device, first);
  check_device(col_ind, "col_ind", device, first);
  check_device(row_order, "row_order", device, first);
  check_dtype(row_ptr, "row_ptr", ScalarType::Int);
  check_dtype(col_ind, "col_ind", ScalarType::Int);
  check_dtype(row_order, "row_order", ScalarType::Int);
  check_vector(row_ptr, "row_ptr", row_ptr.numel());
  CSB_CHECK(row_ptr.numel() >= 1, "row_ptr: expected m + 1 elements, got 0");
  const int64_t m = row_ptr.numel() - 1;
  check_vector(col_ind, "col_ind", col_ind.numel());
  check_vector(row_order, "row_order", m);
  CSB_CHECK(m <= kInt32Max, "row_ptr: expected at most 2^31 - 1 rows, got ", m);
  CSB_CHECK(col_ind.numel() <= kInt32Max, "col_ind: expected at most 2^31 - 1 entries, got ", col_ind.numel());
  CsrView w{};
  w.m = static_cast<int32_t>(m);
  w.nnz = static_cast<int32_t>(col_ind.numel());
  w.row_ptr = static_cast<const int32_t*>(row_ptr.data_ptr());
  w.col_ind = static_cast<const int32_t*>(col_ind.data_ptr());
  w.row_order = static_cast<const int32_t*>(row_order.data_ptr());
  return w;
}

void check_matrix(const Tensor& tensor, const char* name) {
  CSB_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), name, ": expected a contiguous matrix, got shape ",
            shape_of(tensor.sizes()), " and strides ", shape_of(tensor.strides()));
}

int32_t columns_of_w(const Tensor& tensor, const char* name) {
  const int64_t k = tensor.size(0);
  CSB_CHECK(k <= kInt32Max, name, ": expected at most 2^31 - 1 rows, got ", k);
  return static_cast<int32_t>(k);
}

CsrSpmmCall prepare_spmm(const Tensor& values, const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order,
                         const Tensor& x) {
  const Device device(x);
  CsrSpmmProblem problem{};
  check_device(values, "values", device, "x");
  problem.w = pattern_of(row_ptr, col_ind, row_order, device, "x");
  problem.dtype = dtype_of(values, "values");
  check_dtype(x, "x", values.scalar_type());
  check_vector(values, "values", problem.w.nnz);
  check_matrix(x, "x");
  problem.w.k = columns_of_w(x, "x");
  problem.n = x.size(1);
  Tensor y = empty({problem.w.m, problem.n}, x.scalar_type(), x);
  problem.values = values.data_ptr();
  problem.x = x.data_ptr();
  problem.y = y.data_ptr();
  return {problem, y};
}

CsrSddmmCall prepare_sddmm(const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order, const Tensor& a,
                           const Tensor& b) {
  const Device device(a);
  CsrSddmmProblem problem{};
  check_device(b, "b", device, "a");
  problem.w = pattern_of(row_ptr, col_ind, row_order, device, "a");
  problem.dtype = dtype_of(a, "a");
  check_dtype(b, "b", a.scalar_type());
  check_matrix(a, "a");
  check_matrix(b, "b");
  CSB_CHECK(a.size(0) == problem.w.m, "a: expected ", problem.w.m, " rows, got shape ", shape_of(a.sizes()));
  CSB_CHECK(b.size(1) == a.size(1), "b: expected ", a.size(1), " columns like a, got shape ", shape_of(b.sizes()));
  problem.w.k = columns_of_w(b, "b");
  problem.n = a.size(1);
  Tensor grad_values = empty({problem.w.nnz}, a.scalar_type(), a);
  problem.a = a.data_ptr();
  problem.b = b.data_ptr();
  problem.grad_values = grad_values.data_ptr();
  return {problem, grad_values};
}

// Below this many multiply-adds a thread costs more than it saves.
constexpr int64_t kThreadWork = int64_t{1} << 16;

// The first row that begins at or after a share of the work, of which a row has one and each of its entries one.
int64_t row_at(const CsrView& w, int64_t share) {
  int64_t low = 0;
  int64_t high = w.m;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (w.row_ptr[middle] + middle < share) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Threads take whole rows and equal shares of the entries, as far as whole rows allow.
template <typename Run>
void for_each_rows(const CsrView& w, int64_t n, const Run& run) {
  const int64_t least = max_of<int64_t>(kThreadWork / max_of<int64_t>(n, 1), 1);
  torch::stable::parallel_for(0, int64_t{w.nnz} + w.m, least,
                              [&](int64_t begin, int64_t end) { run(row_at(w, begin), row_at(w, end)); });
}

Tensor row_split(const Tensor& values, const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order,
                 const Tensor& x) {
  const CsrSpmmCall call = prepare_spmm(values, row_ptr, col_ind, row_order, x);
  if (call.y.numel() == 0) return call.y;
  for_each_rows(call.problem.w, call.problem.n,
                [&](int64_t begin, int64_t end) { baseline::cpu::row_split(call.problem, begin, end); });
  return call.y;
}

Tensor sddmm(const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order, const Tensor& a, const Tensor& b) {
  const CsrSddmmCall call = prepare_sddmm(row_ptr, col_ind, row_order, a, b);
  if (call.grad_values.numel() == 0) return call.grad_values;
  for_each_rows(call.problem.w, call.problem.n,
                [&](int64_t begin, int64_t end) { baseline::cpu::sddmm(call.problem, begin, end); });
  return call.grad_values;
}

#ifdef TORCH_CSB_WITH_CUDA

using CudaSpmm = cudaError_t(const CsrSpmmProblem& problem, cudaStream_t stream);

Tensor cuda_spmm(CudaSpmm* kernel, const char* name, const CsrSpmmCall& call) {
  if (call.y.numel() == 0) return call.y;
  const Launch launch(call.y);
  check_cuda(kernel(call.problem, launch.stream()), name);
  return call.y;
}

Tensor cuda_row_split(const Tensor& values, const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order,
                      const Tensor& x) {
  return cuda_spmm(&baseline::row_split, "csr_row_split", prepare_spmm(values, row_ptr, col_ind, row_order, x));
}

Tensor cuda_merge(const Tensor& values, const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order,
                  const Tensor& x) {
  CsrSpmmCall call = prepare_spmm(values, row_ptr, col_ind, row_order, x);
  const size_t bytes = call.y.numel() == 0 ? 0 : baseline::merge_scratch_bytes(call.problem);
  const Tensor scratch = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte, call.y);
  call.problem.scratch = scratch.data_ptr();
  return cuda_spmm(&baseline::merge, "csr_merge", call);
}

Tensor cuda_row_swizzle(const Tensor& values, const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order,
                        const Tensor& x) {
  return cuda_spmm(&baseline::row_swizzle, "csr_row_swizzle", prepare_spmm(values, row_ptr, col_ind, row_order, x));
}

Tensor cuda_sddmm(const Tensor& row_ptr, const Tensor& col_ind, const Tensor& row_order, const Tensor& a,
                  const Tensor& b) {
  const CsrSddmmCall call = prepare_sddmm(row_ptr, col_ind, row_order, a, b);
  if (call.grad_values.numel() == 0) return call.grad_values;
  const Launch launch(call.grad_values);
  check_cuda(baseline::csr_sddmm(call.problem, launch.stream()), "csr_sddmm");
  return call.grad_values;
}

#endif  // TORCH_CSB_WITH_CUDA

}  // namespace
}  // namespace csb::border

STABLE_TORCH_LIBRARY_IMPL(torch_csb, CPU, library) {
  using namespace csb::border;
  library.impl("csr_row_split", TORCH_BOX(&row_split));
  library.impl("csr_sddmm", TORCH_BOX(&sddmm));
}

#ifdef TORCH_CSB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(torch_csb, CUDA, library) {
  using namespace csb::border;
  library.impl("csr_row_split", TORCH_BOX(&cuda_row_split));
  library.impl("csr_merge", TORCH_BOX(&cuda_merge));
  library.impl("csr_row_swizzle", TORCH_BOX(&cuda_row_swizzle));
  library.impl("csr_sddmm", TORCH_BOX(&cuda_sddmm));
}
#endif
