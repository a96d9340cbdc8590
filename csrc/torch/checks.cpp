#include "torch/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <array>

namespace csb::border {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(name, ": expected dtype float64, float32, bfloat16 or float16, got ", name_of(tensor.scalar_type()));
  }
}

void check_device(const Tensor& tensor, const char* name, const Device& device, const char* first) {
  const bool known = tensor.is_cuda() || tensor.is_cpu();
  const bool same =
      known && tensor.is_cuda() == device.cuda && (!device.cuda || tensor.get_device_index() == device.index);
  if (!same) fail(name, ": expected a tensor on ", device, " like ", first, ", got one on ", Device(tensor));
}

void check_dtype(const Tensor& tensor, const char* name, ScalarType type) {
  CSB_CHECK(tensor.scalar_type() == type, name, ": expected dtype ", name_of(type), ", got ",
            name_of(tensor.scalar_type()));
}

void check_vector(const Tensor& tensor, const char* name, int64_t length) {
  CSB_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name, ": expected a contiguous 1-D tensor, got shape ",
            shape_of(tensor.sizes()));
  CSB_CHECK(tensor.numel() == length, name, ": expected ", length, " elements, got ", tensor.numel());
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::array<int64_t, 8> strides{};
  std::vector<int64_t> long_strides;
  int64_t* stride = strides.data();
  if (sizes.size() > strides.size()) {
    long_strides.resize(sizes.size());
    stride = long_strides.data();
  }
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    stride[d] = step;
    step *= max_of<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  const int32_t device_type = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), stride,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace csb::border
