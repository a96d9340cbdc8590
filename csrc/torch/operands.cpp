#include "torch/operands.h"

#include <torch/csrc/stable/ops.h>

namespace csb::border {
namespace {

int32_t shift_of(int64_t block_size) {
  CSB_CHECK(block_size >= 2 && block_size <= 256 && (block_size & (block_size - 1)) == 0,
            "block_size: expected a power of two from 2 to 256, got ", block_size);
  int32_t shift = 0;
  while ((int64_t{1} << shift) < block_size) ++shift;
  return shift;
}

CsbView sizes_of(int64_t m, int64_t k, int64_t block_size) {
  CSB_CHECK(m >= 0 && m <= kInt32Max && k >= 0 && k <= kInt32Max, "m, k: expected sizes from 0 to 2^31 - 1, got ", m,
            " and ", k);
  CsbView w{};
  w.m = static_cast<int32_t>(m);
  w.k = static_cast<int32_t>(k);
  w.block_shift = shift_of(block_size);
  w.mb = static_cast<int32_t>(ceil_div(m, block_size));
  w.kb = static_cast<int32_t>(ceil_div(k, block_size));
  CSB_CHECK(int64_t{w.mb} * w.kb < kInt32Max, "block_size: ", m, " x ", k, " needs ", int64_t{w.mb} * w.kb,
            " blocks of size ", block_size, ", more than 2^31 - 2");
  return w;
}

constexpr int64_t kBitmapBlock = 64;

bool is_bitmap(const Tensor& codes) {
  if (codes.scalar_type() == ScalarType::Long) return true;
  CSB_CHECK(codes.scalar_type() == ScalarType::Byte, "codes: expected dtype uint8 (codes) or int64 (a bitmap), got ",
            name_of(codes.scalar_type()));
  return false;
}

// Elements of a bitmap's tensor, 64 bits each.
int64_t words_of(const CsbView& w) { return int64_t{w.num_blocks()} * (kBitmapWords / 2); }

void check_stored(int64_t stored, const char* name) {
  CSB_CHECK(stored >= 0 && stored <= kInt32Max, name, ": expected 0 to 2^31 - 1 entries, got ", stored);
}

// Codes tell how many entries there are, a bitmap does not.
void check_values(const Tensor& values, const Tensor& codes) {
  check_vector(values, "values", is_bitmap(codes) ? values.numel() : codes.numel() / 2);
  check_stored(values.numel(), "values");
}

CsbView pattern_of(const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad, int64_t m, int64_t k,
                   int64_t block_size, const Device& device, const char* first) {
  check_device(codes, "codes", device, first);
  check_device(blk_ptr, "blk_ptr", device, first);
  check_device(blk_pad, "blk_pad", device, first);
  const bool bitmap = is_bitmap(codes);
  check_dtype(blk_ptr, "blk_ptr", ScalarType::Int);
  check_dtype(blk_pad, "blk_pad", ScalarType::Byte);
  CsbView w = sizes_of(m, k, block_size);
  if (bitmap) {
    CSB_CHECK(block_size == kBitmapBlock, "block_size: expected ", kBitmapBlock, " with a bitmap, got ", block_size);
    check_vector(codes, "codes", words_of(w));
  } else {
    check_vector(codes, "codes", codes.numel() / 2 * 2);
    check_stored(codes.numel() / 2, "codes");
  }
  check_vector(blk_ptr, "blk_ptr", int64_t{w.num_blocks()} + 1);
  check_vector(blk_pad, "blk_pad", w.num_blocks());
  const void* data = codes.data_ptr();
  const uintptr_t alignment = device.cuda && block_size >= 16 ? 16 : bitmap ? 8 : 2;
  CSB_CHECK(reinterpret_cast<uintptr_t>(data) % alignment == 0, "codes: expected data aligned to ", alignment,
            " bytes");
  if (bitmap) {
    w.bitmap = static_cast<const uint32_t*>(data);
  } else {
    w.codes = static_cast<const uint16_t*>(data);
  }
  w.blk_ptr = static_cast<const int32_t*>(blk_ptr.data_ptr());
  w.blk_pad = static_cast<const uint8_t*>(blk_pad.data_ptr());
  return w;
}

// Row 0 of units serves W and SDDMM, row 1 the transpose.
const int32_t* units_of(const Tensor& units, bool transposed, int32_t* num_units, const Device& device,
                        const char* first) {
  check_device(units, "units", device, first);
  check_dtype(units, "units", ScalarType::Int);
  CSB_CHECK(units.dim() == 2 && units.size(0) == 2 && units.size(1) >= 2 && units.is_contiguous(),
            "units: expected a contiguous [2, num_units + 1] tensor, got shape ", shape_of(units.sizes()));
  *num_units = static_cast<int32_t>(units.size(1) - 1);
  return static_cast<const int32_t*>(units.data_ptr()) + (transposed ? units.size(1) : 0);
}

int64_t feature_dim(const Tensor& tensor, const char* name, int64_t dim) {
  const int64_t rank = tensor.dim();
  CSB_CHECK(rank >= 1 && dim >= -rank && dim < rank, "dim: expected a dimension of ", name, " with shape ",
            shape_of(tensor.sizes()), ", got ", dim);
  return dim < 0 ? dim + rank : dim;
}

// The columns of `tensor`, its non-feature dimensions merged where memory allows. A tensor whose
// columns need more than three strides is made contiguous (as F.linear would), hence the reference.
DenseView view_of(Tensor& tensor, int64_t dim) {
  for (;;) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    DenseView view{tensor.data_ptr(), strides[dim], 1, {1, 1, 1}, {0, 0, 0}};
    int level = 3;
    bool fits = true;
    for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
      if (d == dim || sizes[d] == 1) continue;
      view.columns *= sizes[d];
      if (level < 3 && strides[d] == view.stride[level] * view.size[level]) {
        view.size[level] *= sizes[d];
      } else if (level == 0) {
        fits = false;
        break;
      } else {
        --level;
        view.size[level] = sizes[d];
        view.stride[level] = strides[d];
      }
    }
    if (!fits && tensor.numel() == 0) {
      // Any empty tensor passes for contiguous, so the next turn would be as this one; nothing of it is read.
      int64_t columns = 1;
      for (int64_t d = 0; d < tensor.dim(); ++d) columns *= d == dim ? 1 : sizes[d];
      return {tensor.data_ptr(), strides[dim], columns, {1, 1, columns}, {0, 0, 0}};
    }
    if (!fits) {
      tensor = torch::stable::contiguous(tensor);
      continue;
    }
    // Levels fill from the inside; a single merged level must be the innermost, as it is.
    return view;
  }
}

ScalarType accumulator_of(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

}  // namespace

SpmmCall prepare_spmm(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad,
                      const Tensor& units, const Tensor& x, const std::optional<Tensor>& bias, int64_t m, int64_t k,
                      int64_t block_size, int64_t dim, int64_t activation, bool transposed) {
  const Device device(x);
  SpmmProblem problem{};
  check_device(values, "values", device, "x");
  problem.w = pattern_of(codes, blk_ptr, blk_pad, m, k, block_size, device, "x");
  problem.units = units_of(units, transposed, &problem.num_units, device, "x");
  problem.dtype = dtype_of(values, "values");
  check_dtype(x, "x", values.scalar_type());
  check_values(values, codes);
  problem.transposed = transposed;
  problem.values = values.data_ptr();
  CSB_CHECK(activation >= 0 && activation <= 4, "activation: expected 0 to 4, got ", activation);
  problem.activation = static_cast<Activation>(activation);

  dim = feature_dim(x, "x", dim);
  CSB_CHECK(x.size(dim) == problem.in_features(), "x: expected ", problem.in_features(), " features in dimension ", dim,
            ", got shape ", shape_of(x.sizes()));
  std::optional<Tensor> packed_bias;
  if (bias.has_value()) {
    check_device(*bias, "bias", device, "x");
    check_dtype(*bias, "bias", values.scalar_type());
    packed_bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    check_vector(*packed_bias, "bias", problem.out_features());
    problem.bias = packed_bias->data_ptr();
  }

  const auto x_sizes = x.sizes();
  std::vector<int64_t> y_sizes(x_sizes.begin(), x_sizes.end());
  y_sizes[dim] = problem.out_features();
  SpmmCall call{problem, empty(y_sizes, x.scalar_type(), x), x, packed_bias, std::nullopt};
  call.problem.x = view_of(call.x, dim);
  call.problem.y = view_of(call.y, dim);
  return call;
}

void allocate_partials(SpmmCall& call) {
  SpmmProblem& problem = call.problem;
  const int64_t slots = int64_t{problem.num_units} + problem.strips();
  call.partials = empty({slots, problem.w.block_size(), problem.y.columns}, accumulator_of(problem.dtype), call.y);
  problem.partials = call.partials->data_ptr();
}

SddmmCall prepare_sddmm(const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad, const Tensor& units,
                        const Tensor& a, const Tensor& b, int64_t m, int64_t k, int64_t block_size, int64_t stored,
                        int64_t dim) {
  const Device device(a);
  SddmmProblem problem{};
  check_device(b, "b", device, "a");
  problem.w = pattern_of(codes, blk_ptr, blk_pad, m, k, block_size, device, "a");
  check_stored(stored, "stored");
  CSB_CHECK(is_bitmap(codes) || stored == codes.numel() / 2, "stored: expected ", codes.numel() / 2,
            " entries as codes has, got ", stored);
  problem.units = units_of(units, false, &problem.num_units, device, "a");
  problem.dtype = dtype_of(a, "a");
  check_dtype(b, "b", a.scalar_type());
  const int64_t dim_a = feature_dim(a, "a", dim);
  const int64_t dim_b = feature_dim(b, "b", dim);
  CSB_CHECK(a.size(dim_a) == m, "a: expected ", m, " features in dimension ", dim_a, ", got shape ",
            shape_of(a.sizes()));
  CSB_CHECK(b.size(dim_b) == k, "b: expected ", k, " features in dimension ", dim_b, ", got shape ",
            shape_of(b.sizes()));
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = d == dim_a || a.size(d) == b.size(d);
  CSB_CHECK(same, "b: expected the sizes of a outside dimension ", dim_a, ", ", shape_of(a.sizes()), ", got ",
            shape_of(b.sizes()));

  problem.entries = stored;
  problem.column_splits = 1;
  SddmmCall call{problem, empty({problem.entries}, a.scalar_type(), a), a, b, std::nullopt};
  call.problem.a = view_of(call.a, dim_a);
  call.problem.b = view_of(call.b, dim_b);
  call.problem.grad_values = call.grad_values.data_ptr();
  return call;
}

void allocate_partials(SddmmCall& call, int32_t column_splits) {
  SddmmProblem& problem = call.problem;
  problem.column_splits = column_splits;
  call.partials = empty({column_splits, problem.entries}, accumulator_of(problem.dtype), call.grad_values);
  problem.partials = call.partials->data_ptr();
}

namespace {

ConvertProblem dense_problem(const Tensor& dense, const std::optional<Tensor>& mask, int64_t block_size) {
  ConvertProblem problem{};
  problem.dtype = dtype_of(dense, "dense");
  CSB_CHECK(dense.dim() == 2, "dense: expected a matrix, got shape ", shape_of(dense.sizes()));
  problem.w = sizes_of(dense.size(0), dense.size(1), block_size);
  problem.dense = dense.data_ptr();
  problem.stride_row = dense.stride(0);
  problem.stride_col = dense.stride(1);
  if (mask.has_value()) {
    check_device(*mask, "mask", Device(dense), "dense");
    check_dtype(*mask, "mask", ScalarType::Bool);
    CSB_CHECK(mask->dim() == 2 && mask->size(0) == dense.size(0) && mask->size(1) == dense.size(1),
              "mask: expected the shape of dense, ", shape_of(dense.sizes()), ", got ", shape_of(mask->sizes()));
    problem.mask = static_cast<const uint8_t*>(mask->data_ptr());
    problem.mask_stride_row = mask->stride(0);
    problem.mask_stride_col = mask->stride(1);
  }
  return problem;
}

}  // namespace

std::tuple<ConvertProblem, Tensor> prepare_count(const Tensor& dense, const std::optional<Tensor>& mask,
                                                 int64_t block_size) {
  ConvertProblem problem = dense_problem(dense, mask, block_size);
  Tensor counts = empty({problem.w.num_blocks()}, ScalarType::Int, dense);
  problem.counts = static_cast<int32_t*>(counts.data_ptr());
  return {problem, counts};
}

std::tuple<ConvertProblem, Tensor, Tensor> prepare_pack(const Tensor& dense, const std::optional<Tensor>& mask,
                                                        const Tensor& blk_ptr, const Tensor& blk_pad,
                                                        int64_t block_size, int64_t stored) {
  ConvertProblem problem = dense_problem(dense, mask, block_size);
  check_stored(stored, "stored");
  Tensor values = empty({stored}, dense.scalar_type(), dense);
  Tensor codes = empty({2 * stored}, ScalarType::Byte, dense);
  problem.w = pattern_of(codes, blk_ptr, blk_pad, dense.size(0), dense.size(1), block_size, Device(dense), "dense");
  problem.codes = static_cast<uint16_t*>(codes.data_ptr());
  problem.values = values.data_ptr();
  return {problem, values, codes};
}

std::tuple<ConvertProblem, Tensor, Tensor> prepare_pack_bitmap(const Tensor& dense, const std::optional<Tensor>& mask,
                                                               const Tensor& blk_ptr, const Tensor& blk_pad,
                                                               int64_t stored) {
  ConvertProblem problem = dense_problem(dense, mask, kBitmapBlock);
  check_stored(stored, "stored");
  Tensor values = empty({stored}, dense.scalar_type(), dense);
  Tensor bitmap = empty({words_of(problem.w)}, ScalarType::Long, dense);
  problem.w = pattern_of(bitmap, blk_ptr, blk_pad, dense.size(0), dense.size(1), kBitmapBlock, Device(dense), "dense");
  problem.bitmap = static_cast<uint32_t*>(bitmap.data_ptr());
  problem.values = values.data_ptr();
  return {problem, values, bitmap};
}

std::tuple<ConvertProblem, Tensor> prepare_to_codes(const Tensor& bitmap, const Tensor& blk_ptr, const Tensor& blk_pad,
                                                    int64_t m, int64_t k, int64_t stored) {
  check_dtype(bitmap, "bitmap", ScalarType::Long);
  ConvertProblem problem{};
  problem.w = pattern_of(bitmap, blk_ptr, blk_pad, m, k, kBitmapBlock, Device(bitmap), "bitmap");
  check_stored(stored, "stored");
  Tensor codes = empty({2 * stored}, ScalarType::Byte, bitmap);
  problem.codes = static_cast<uint16_t*>(codes.data_ptr());
  return {problem, codes};
}

std::tuple<ConvertProblem, Tensor> prepare_unpack(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr,
                                                  const Tensor& blk_pad, int64_t m, int64_t k, int64_t block_size) {
  ConvertProblem problem{};
  problem.dtype = dtype_of(values, "values");
  problem.w = pattern_of(codes, blk_ptr, blk_pad, m, k, block_size, Device(values), "values");
  check_values(values, codes);
  Tensor dense = empty({m, k}, values.scalar_type(), values);
  problem.dense = dense.data_ptr();
  problem.stride_row = k;
  problem.stride_col = 1;
  problem.values = values.data_ptr();
  return {problem, dense};
}

}  // namespace csb::border
