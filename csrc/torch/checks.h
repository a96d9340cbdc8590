#pragma once

#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "csb/problem.h"

// What every operator asks of its tensors. Checks run in one order: device, dtype, layout, shape,
// range of sizes; a message names the argument: "expected X, got Y".
namespace csb::border {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, so that a message costs nothing until it is needed.
#define CSB_CHECK(condition, ...)                                            \
  do {                                                                       \
    if (__builtin_expect(!(condition), 0)) ::csb::border::fail(__VA_ARGS__); \
  } while (false)

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

template <typename Sizes>
std::string shape_of(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

struct Device {
  bool cuda;
  int32_t index;

  explicit Device(const Tensor& tensor) : cuda(tensor.is_cuda()), index(tensor.get_device_index()) {}

  friend std::ostream& operator<<(std::ostream& out, const Device& device) {
    return device.cuda ? out << "cuda:" << device.index : out << "cpu";
  }
};

const char* name_of(ScalarType type);
DType dtype_of(const Tensor& tensor, const char* name);

// `first` is the argument whose device the others must share.
void check_device(const Tensor& tensor, const char* name, const Device& device, const char* first);
void check_dtype(const Tensor& tensor, const char* name, ScalarType type);
void check_vector(const Tensor& tensor, const char* name, int64_t length);

// A contiguous tensor on the device of `like`.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like);

}  // namespace csb::border
