// torch_csb._plan: the planner as Python sees it, for tests, explain() and plots.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "plan/cpu_config.h"
#include "plan/cuda_config.h"
#include "plan/units.h"

namespace py = pybind11;

namespace csb::plan {
namespace {

// Without forcecast a wrong dtype is a TypeError instead of a silent copy.
using Int32Array = py::array_t<int32_t, py::array::c_style>;
using UInt8Array = py::array_t<uint8_t, py::array::c_style>;

void check(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

void check_size(const char* name, int64_t expected, int64_t got) {
  check(expected == got,
        std::string("expected ") + name + " with " + std::to_string(expected) + " entries, got " + std::to_string(got));
}

void check_pattern(const Int32Array& blk_ptr, const UInt8Array& blk_pad, int32_t mb, int32_t kb) {
  check(mb >= 0 && kb >= 0,
        "expected mb and kb of at least 0, got " + std::to_string(mb) + " and " + std::to_string(kb));
  const int64_t blocks = int64_t{mb} * kb;
  check(blocks < INT32_MAX, "expected fewer than 2^31 blocks, got " + std::to_string(blocks));
  check_size("blk_ptr", blocks + 1, blk_ptr.size());
  check_size("blk_pad", blocks, blk_pad.size());
}

Int32Array plan_units_py(const Int32Array& blk_ptr, const UInt8Array& blk_pad, int32_t mb, int32_t kb) {
  check_pattern(blk_ptr, blk_pad, mb, kb);
  const Units units = plan_units(blk_ptr.data(), blk_pad.data(), mb, kb);
  Int32Array result({int64_t{2}, int64_t{units.num_units} + 1});
  int32_t* out = result.mutable_data();
  out = std::copy(units.row_major.begin(), units.row_major.end(), out);
  std::copy(units.column_major.begin(), units.column_major.end(), out);
  return result;
}

py::array_t<int64_t> unit_nonzeros_py(const Int32Array& blk_ptr, const UInt8Array& blk_pad, int32_t mb, int32_t kb,
                                      const Int32Array& begin, bool column_major) {
  check_pattern(blk_ptr, blk_pad, mb, kb);
  check(begin.size() >= 1, "expected begin with at least 1 entry, got 0");
  const int32_t* first = begin.data();
  const int32_t* last = first + begin.size() - 1;
  check(*first >= 0 && std::is_sorted(first, last + 1) && *last <= mb * kb,
        "expected begin to rise from 0 to at most mb * kb = " + std::to_string(mb * kb));
  const auto counts = unit_nonzeros(blk_ptr.data(), blk_pad.data(), mb, kb, first,
                                    static_cast<int32_t>(begin.size() - 1), column_major);
  return py::array_t<int64_t>(static_cast<py::ssize_t>(counts.size()), counts.data());
}

constexpr int32_t kHopperSharedBytes = 227 * 1024;

DType dtype_named(const std::string& name) {
  if (name == "float64") return DType::kFloat64;
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("expected dtype float64, float32, bfloat16 or float16, got " + name);
}

int32_t checked_shift(int32_t block_size) {
  for (int32_t shift = 1; shift <= 8; ++shift) {
    if (block_size == 1 << shift) return shift;
  }
  throw std::invalid_argument("expected block_size to be a power of two from 2 to 256, got " +
                              std::to_string(block_size));
}

// What every choice has in common: which kernel, how wide a tile, whether and how the work is cut, and why.
struct Choice {
  std::string kernel;
  int32_t tile_n;
  py::object split;
  std::string reason;
  int32_t cluster = 1;

  std::string repr() const {
    return "Choice(kernel='" + kernel + "', tile_n=" + std::to_string(tile_n) +
           ", split=" + py::repr(split).cast<std::string>() + ", reason='" + reason + "')";
  }
};

std::string name_of(CudaKernel kernel) {
  switch (kernel) {
    case CudaKernel::kGather:
      return "gather";
    case CudaKernel::kTile:
      return "tile";
    case CudaKernel::kSpmv:
      return "spmv";
    case CudaKernel::kNarrow:
      return "narrow";
    case CudaKernel::kBitmap:
      return "bitmap";
    case CudaKernel::kWide:
      return "wide";
    case CudaKernel::kRows:
      return "rows";
    case CudaKernel::kRegion:
      return "region";
    case CudaKernel::kPanel:
      return "panel";
  }
  throw std::logic_error("a CUDA kernel without a name");
}

Choice choose_cpu_spmm_py(const std::string& dtype, int32_t block_size, int32_t strips, int32_t num_units,
                          int64_t columns) {
  const auto config = choose_cpu_spmm(dtype_named(dtype), checked_shift(block_size), strips, num_units, columns);
  return {"cpu", config.tile_n, py::bool_(config.split_strips), config.reason};
}

Choice choose_cpu_sddmm_py(const std::string& dtype, int32_t block_size, int32_t num_units, int64_t columns) {
  const auto config = choose_cpu_sddmm(dtype_named(dtype), checked_shift(block_size), num_units, columns);
  return {"cpu", config.tile_n, py::int_(config.column_splits), config.reason};
}

Choice choose_cuda_spmm_py(const std::string& dtype, int32_t block_size, int32_t strips, int32_t num_units,
                           int64_t columns, int32_t multiprocessors, const PanelOffer& offer, int32_t blocks_per_strip,
                           bool pieces, bool hopper, int32_t shared_bytes, bool bitmap) {
  const auto config =
      choose_cuda_spmm(dtype_named(dtype), checked_shift(block_size), strips, num_units, columns,
                       {multiprocessors, hopper, shared_bytes}, {blocks_per_strip, pieces, offer, bitmap});
  return {name_of(config.kernel), config.tile_n, py::bool_(config.split_strips), config.reason, config.cluster};
}

Choice choose_cuda_sddmm_py(const std::string& dtype, int32_t block_size, int32_t num_units, int64_t columns,
                            int32_t multiprocessors, const PanelOffer& offer, bool region, int32_t shared_bytes) {
  const auto config = choose_cuda_sddmm(dtype_named(dtype), checked_shift(block_size), num_units, columns,
                                        {multiprocessors, true, shared_bytes}, {region, offer});
  return {name_of(config.kernel), config.tile_n, py::int_(config.column_splits), config.reason};
}

}  // namespace

PYBIND11_MODULE(_plan, module) {
  module.doc() = "The planner: work units of a pattern, and which kernel runs a problem and why.";
  using py::arg;

  py::class_<Choice>(
      module, "Choice",
      "Which kernel runs and why. split: for spmm whether output strips are shared between work units, "
      "for sddmm the number of runs that the columns are cut into. cluster: thread blocks that share a strip.")
      .def_readonly("kernel", &Choice::kernel)
      .def_readonly("tile_n", &Choice::tile_n)
      .def_readonly("split", &Choice::split)
      .def_readonly("reason", &Choice::reason)
      .def_readonly("cluster", &Choice::cluster)
      .def("__repr__", &Choice::repr);

  py::class_<PanelOffer>(module, "PanelOffer",
                         "What a product says of itself to have panels of W considered: whether its tensors suit a "
                         "dense product, the features that panels cut, W's other dimension and its stored entries.")
      .def(py::init([](bool fits, int64_t features, int64_t depth, int64_t stored) {
             return PanelOffer{fits, features, depth, stored};
           }),
           arg("fits"), arg("features"), arg("depth"), arg("stored"));

  module.def(
      "plan_units", &plan_units_py, arg("blk_ptr"), arg("blk_pad"), arg("mb"), arg("kb"),
      "Work units balanced by nonzeros, int32 [2, units + 1]: the first block position of each unit in row-major "
      "order (row 0) and in column-major order (row 1).");
  module.def("unit_nonzeros", &unit_nonzeros_py, arg("blk_ptr"), arg("blk_pad"), arg("mb"), arg("kb"), arg("begin"),
             arg("column_major"), "Nonzeros of each unit of one walk, int64 [units].");
  module.def("choose_cpu_spmm", &choose_cpu_spmm_py, arg("dtype"), arg("block_size"), arg("strips"), arg("num_units"),
             arg("columns"));
  module.def("choose_cpu_sddmm", &choose_cpu_sddmm_py, arg("dtype"), arg("block_size"), arg("num_units"),
             arg("columns"));
  module.def("choose_cuda_spmm", &choose_cuda_spmm_py, arg("dtype"), arg("block_size"), arg("strips"), arg("num_units"),
             arg("columns"), arg("multiprocessors"), arg("offer") = PanelOffer{}, arg("blocks_per_strip") = 0,
             arg("pieces") = true, arg("hopper") = true, arg("shared_bytes") = kHopperSharedBytes,
             arg("bitmap") = false);
  module.def("choose_cuda_sddmm", &choose_cuda_sddmm_py, arg("dtype"), arg("block_size"), arg("num_units"),
             arg("columns"), arg("multiprocessors"), arg("offer") = PanelOffer{}, arg("region") = true,
             arg("shared_bytes") = kHopperSharedBytes);
}

}  // namespace csb::plan
