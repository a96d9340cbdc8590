#ifdef TORCH_CSB_WITH_CUDA

#include "torch/panel.h"

#include "cuda/panel/panel.h"
#include "torch/blas.h"

namespace csb::border {
namespace {

// Products of fewer columns than this, one for each image, leave cuBLAS's tiles half empty.
constexpr int64_t kMinInner = 64;

// In the SDDMM every image is a product of its own, added to those before.
constexpr int64_t kMinSddmmInner = 256;

int32_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

const void* at(const void* data, int64_t element, DType dtype) {
  return static_cast<const char*>(data) + element * element_size(dtype);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// An activation tensor as `batch` matrices of `inner` columns.
struct Batches {
  const void* data;
  int64_t batch;
  int64_t inner;
  int64_t stride_batch;
  int64_t stride_inner;
  int64_t stride_f;

  // `count` of its features from `first` on, columns x features.
  Matrix columns_by_features(int64_t first, int64_t count, DType dtype) const {
    return {at(data, first * stride_f, dtype), inner, count, stride_inner, stride_f, stride_batch};
  }
};

bool one_run(const DenseView& view) { return view.size[0] == 1 && view.size[1] == 1; }

// A single run of columns is as many batches as one likes.
bool as_batches(const DenseView& view, int64_t batch, int64_t inner, Batches* result) {
  const bool direct = view.size[0] == 1 && view.size[1] == batch && view.size[2] == inner;
  if (!one_run(view) && !direct) return false;
  *result = {view.data,      batch,        inner, one_run(view) ? inner * view.stride[2] : view.stride[1],
             view.stride[2], view.stride_f};
  return true;
}

// Both tensors cut alike, into as few batches as their memory allows.
bool as_batches(const DenseView& a, const DenseView& b, Batches* batches_a, Batches* batches_b) {
  const DenseView& cut = one_run(a) ? b : a;
  return as_batches(a, cut.size[1], cut.size[2], batches_a) && as_batches(b, cut.size[1], cut.size[2], batches_b);
}

// The panels of W one after another, in one buffer.
class Panels {
 public:
  // `features` block rows' worth at a time, block columns' when transposed.
  Panels(const CsbView& w, DType dtype, const Tensor& values, bool transposed, int32_t features)
      : transposed_(transposed), strips_(features >> w.block_shift) {
    problem_.w = w;
    problem_.element_size = element_size(dtype);
    problem_.block_rows = w.mb;
    problem_.block_cols = w.kb;
    problem_.values = values.data_ptr();
    move_to(0);
    buffer_ = empty({problem_.rows(), problem_.ld}, values.scalar_type(), values);
    problem_.panel = buffer_->data_ptr();
  }

  bool done() const { return transposed_ ? problem_.block_col >= problem_.w.kb : problem_.block_row >= problem_.w.mb; }
  void next() { move_to((transposed_ ? problem_.block_col : problem_.block_row) + strips_); }
  const PanelProblem& problem() const { return problem_; }

  int64_t first() const {
    return int64_t{transposed_ ? problem_.block_col : problem_.block_row} << problem_.w.block_shift;
  }
  int64_t features() const { return transposed_ ? problem_.columns() : problem_.rows(); }

  // The panel of op(W), transposed: in_features x features.
  Matrix depth_by_features() const {
    const int64_t depth = transposed_ ? problem_.rows() : problem_.columns();
    return {problem_.panel, depth, features(), transposed_ ? problem_.ld : 1, transposed_ ? 1 : problem_.ld, 0};
  }

 private:
  void move_to(int32_t strip) {
    const int32_t left = (transposed_ ? problem_.w.kb : problem_.w.mb) - strip;
    (transposed_ ? problem_.block_col : problem_.block_row) = strip;
    (transposed_ ? problem_.block_cols : problem_.block_rows) = min_of(strips_, left);
    if (left > 0) problem_.ld = round_up<int64_t>(problem_.columns(), 8);
  }

  bool transposed_;
  int32_t strips_;
  PanelProblem problem_{};
  std::optional<Tensor> buffer_;
};

// The features of Y that a panel computes, as runs of memory. Y is contiguous, so its features stand
// last, or first in every image.
EpilogueProblem epilogue_of(const SpmmProblem& problem, const Batches& y, const Panels& panels) {
  const bool last = y.stride_f == 1;
  EpilogueProblem slice{};
  slice.dtype = problem.dtype;
  slice.activation = problem.activation;
  slice.bias = problem.bias == nullptr ? nullptr : at(problem.bias, panels.first(), problem.dtype);
  slice.columns_per_feature = last ? 1 : y.inner;
  slice.data = const_cast<void*>(at(problem.y.data, panels.first() * y.stride_f, problem.dtype));
  slice.runs = last ? y.batch * y.inner : y.batch;
  slice.length = panels.features() * slice.columns_per_feature;
  slice.stride = problem.out_features() * slice.columns_per_feature;
  return slice;
}

}  // namespace

plan::PanelOffer panel_offer(const SpmmProblem& problem, int64_t stored) {
  Batches x{}, y{};
  const int64_t depth = problem.in_features();
  const int64_t features = problem.out_features();
  const bool fits = blas_available() && as_batches(problem.x, problem.y, &x, &y) &&
                    (x.batch == 1 || x.inner >= kMinInner) && x.batch <= kInt32Max &&
                    is_blas_matrix(x.columns_by_features(0, depth, problem.dtype)) &&
                    is_blas_matrix(y.columns_by_features(0, features, problem.dtype)) && aligned(problem.values);
  return {fits, features, depth, stored};
}

plan::PanelOffer panel_offer(const SddmmProblem& problem) {
  Batches a{}, b{};
  const bool sums_exactly = problem.dtype == DType::kFloat32;  // 16-bit sums would be rounded at every image
  const bool fits = blas_available() && as_batches(problem.a, problem.b, &a, &b) &&
                    (a.batch == 1 || (sums_exactly && a.inner >= kMinSddmmInner)) &&
                    is_blas_matrix(a.columns_by_features(0, problem.w.m, problem.dtype)) &&
                    is_blas_matrix(b.columns_by_features(0, problem.w.k, problem.dtype)) &&
                    aligned(problem.grad_values);
  return {fits, problem.w.m, problem.w.k, problem.entries};
}

// cuBLAS adds the bias, so that a 16-bit sum is rounded once; relu and relu6 of a rounded sum are the
// rounded relu and relu6. silu and gelu are not, and round a second time, as they do after F.linear;
// the bias is then left to them.
void spmm_by_panels(const SpmmCall& call, const Tensor& values, int32_t features, const Launch& launch) {
  const SpmmProblem& problem = call.problem;
  Batches x{}, y{};
  CSB_CHECK(as_batches(problem.x, problem.y, &x, &y), "x: expected columns that a dense product can read");
  const bool bias_last = problem.activation == Activation::kSilu || problem.activation == Activation::kGelu;
  const bool bias_first = problem.bias != nullptr && !bias_last;
  const Matrix from = x.columns_by_features(0, problem.in_features(), problem.dtype);
  Panels panels(problem.w, problem.dtype, values, problem.transposed, features);
  for (; !panels.done(); panels.next()) {
    EpilogueProblem epilogue = epilogue_of(problem, y, panels);
    check_cuda(cuda::unpack_panel(panels.problem(), launch.stream()), "spmm: panel");
    if (bias_first) check_cuda(cuda::fill_bias(epilogue, launch.stream()), "spmm: bias");
    const Matrix to = y.columns_by_features(panels.first(), panels.features(), problem.dtype);
    multiply(to, from, panels.depth_by_features(), y.batch, problem.dtype, bias_first);
    if (!bias_last) epilogue.bias = nullptr;
    check_cuda(cuda::activate_in_place(epilogue, launch.stream()), "spmm: activation");
  }
}

void sddmm_by_panels(const SddmmCall& call, int32_t features, const Launch& launch) {
  const SddmmProblem& problem = call.problem;
  Batches a{}, b{};
  CSB_CHECK(as_batches(problem.a, problem.b, &a, &b), "a: expected columns that a dense product can read");
  Panels panels(problem.w, problem.dtype, call.grad_values, false, features);
  for (; !panels.done(); panels.next()) {
    // The panel's transpose, k x rows = B . A^T, one image after another.
    for (int64_t image = 0; image < a.batch; ++image) {
      Matrix left = a.columns_by_features(panels.first(), panels.features(), problem.dtype);
      Matrix right = b.columns_by_features(0, problem.w.k, problem.dtype);
      left.data = at(left.data, image * a.stride_batch, problem.dtype);
      right.data = at(right.data, image * b.stride_batch, problem.dtype);
      const Matrix right_t = {right.data, right.cols, right.rows, right.stride_col, right.stride_row, 0};
      multiply(panels.depth_by_features(), right_t, left, 1, problem.dtype, image > 0);
    }
    check_cuda(cuda::sample_panel(panels.problem(), launch.stream()), "sddmm: panel");
  }
}

}  // namespace csb::border

#endif  // TORCH_CSB_WITH_CUDA
