#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/convert.h"
#include "cpu/sddmm.h"
#include "cpu/spmm.h"
#include "plan/units.h"
#include "torch/operands.h"

namespace csb::border {
namespace {

// Below this many multiply-adds a fork of the thread pool costs more than it saves.
constexpr int64_t kSerialWork = int64_t{1} << 16;

template <typename Run>
void for_each_range(int64_t tasks, int64_t work, const Run& run) {
  if (tasks <= 1 || work < kSerialWork) {
    run(0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, 1, run);
  }
}

int64_t dense_work(const ConvertProblem& problem) { return int64_t{problem.w.m} * problem.w.k; }

void run_to_codes(const ConvertProblem& problem, int64_t stored) {
  const int32_t end = problem.w.blk_ptr[problem.w.num_blocks()];
  CSB_CHECK(end == stored, "blk_ptr: expected to end at ", stored, " stored entries, got ", end);
  for_each_range(cpu::convert_tasks(problem), dense_work(problem),
                 [&](int64_t begin, int64_t end) { cpu::to_codes(problem, begin, end); });
}

// The kernels read codes. Those of a bitmap live as long as a call.
std::optional<Tensor> expand_bitmap(CsbView& w, int64_t stored, const Tensor& like) {
  if (w.bitmap == nullptr) return std::nullopt;
  Tensor codes = empty({2 * stored}, ScalarType::Byte, like);
  ConvertProblem problem{};
  problem.w = w;
  problem.codes = static_cast<uint16_t*>(codes.data_ptr());
  run_to_codes(problem, stored);
  w.codes = problem.codes;
  w.bitmap = nullptr;
  return codes;
}

Tensor spmm_either(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad,
                   const Tensor& units, const Tensor& x, const std::optional<Tensor>& bias, int64_t m, int64_t k,
                   int64_t block_size, int64_t dim, int64_t activation, bool transposed) {
  SpmmCall call =
      prepare_spmm(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation, transposed);
  SpmmProblem& problem = call.problem;
  if (call.y.numel() == 0) return call.y;
  const auto expanded = expand_bitmap(problem.w, values.numel(), values);
  plan::CpuSpmmConfig config = plan::choose_cpu_spmm(problem.dtype, problem.w.block_shift, problem.strips(),
                                                     problem.num_units, problem.y.columns);
  config.split_strips = config.split_strips && problem.num_units > 1;
  if (config.split_strips) allocate_partials(call);
  const int64_t work = (values.numel() + problem.out_features()) * problem.y.columns;
  for_each_range(cpu::spmm_tasks(problem, config), work,
                 [&](int64_t begin, int64_t end) { cpu::spmm(problem, config, begin, end); });
  if (config.split_strips) {
    for_each_range(cpu::join_tasks(problem, config), work,
                   [&](int64_t begin, int64_t end) { cpu::join(problem, config, begin, end); });
  }
  return call.y;
}

Tensor spmm(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad,
            const Tensor& units, const Tensor& x, const std::optional<Tensor>& bias, int64_t m, int64_t k,
            int64_t block_size, int64_t dim, int64_t activation) {
  return spmm_either(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation, false);
}

Tensor spmm_t(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad,
              const Tensor& units, const Tensor& x, const std::optional<Tensor>& bias, int64_t m, int64_t k,
              int64_t block_size, int64_t dim, int64_t activation) {
  return spmm_either(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation, true);
}

Tensor sddmm(const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad, const Tensor& units, const Tensor& a,
             const Tensor& b, int64_t m, int64_t k, int64_t block_size, int64_t stored, int64_t dim) {
  SddmmCall call = prepare_sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, stored, dim);
  SddmmProblem& problem = call.problem;
  if (problem.entries == 0) return call.grad_values;
  const auto expanded = expand_bitmap(problem.w, stored, a);
  const plan::CpuSddmmConfig config =
      plan::choose_cpu_sddmm(problem.dtype, problem.w.block_shift, problem.num_units, problem.a.columns);
  if (config.column_splits > 1) allocate_partials(call, config.column_splits);
  const int64_t work = problem.entries * max_of<int64_t>(problem.a.columns, 1);
  for_each_range(cpu::sddmm_tasks(problem, config), work,
                 [&](int64_t begin, int64_t end) { cpu::sddmm(problem, config, begin, end); });
  if (config.column_splits > 1) {
    for_each_range(cpu::sddmm_join_tasks(problem, config), problem.entries * config.column_splits,
                   [&](int64_t begin, int64_t end) { cpu::sddmm_join(problem, config, begin, end); });
  }
  return call.grad_values;
}

Tensor count(const Tensor& dense, const std::optional<Tensor>& mask, int64_t block_size) {
  auto [problem, counts] = prepare_count(dense, mask, block_size);
  for_each_range(cpu::convert_tasks(problem), dense_work(problem),
                 [&p = problem](int64_t begin, int64_t end) { cpu::count(p, begin, end); });
  return counts;
}

std::tuple<Tensor, Tensor> pack(const Tensor& dense, const std::optional<Tensor>& mask, const Tensor& blk_ptr,
                                const Tensor& blk_pad, int64_t block_size, int64_t stored) {
  auto [problem, values, codes] = prepare_pack(dense, mask, blk_ptr, blk_pad, block_size, stored);
  for_each_range(cpu::convert_tasks(problem), dense_work(problem),
                 [&p = problem](int64_t begin, int64_t end) { cpu::pack(p, begin, end); });
  return {values, codes};
}

std::tuple<Tensor, Tensor> pack_bitmap(const Tensor& dense, const std::optional<Tensor>& mask, const Tensor& blk_ptr,
                                       const Tensor& blk_pad, int64_t stored) {
  auto [problem, values, bitmap] = prepare_pack_bitmap(dense, mask, blk_ptr, blk_pad, stored);
  for_each_range(cpu::convert_tasks(problem), dense_work(problem),
                 [&p = problem](int64_t begin, int64_t end) { cpu::pack_bitmap(p, begin, end); });
  return {values, bitmap};
}

Tensor to_codes(const Tensor& bitmap, const Tensor& blk_ptr, const Tensor& blk_pad, int64_t m, int64_t k,
                int64_t stored) {
  auto [problem, codes] = prepare_to_codes(bitmap, blk_ptr, blk_pad, m, k, stored);
  run_to_codes(problem, stored);
  return codes;
}

Tensor unpack(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad, int64_t m,
              int64_t k, int64_t block_size) {
  auto [problem, dense] = prepare_unpack(values, codes, blk_ptr, blk_pad, m, k, block_size);
  const auto expanded = expand_bitmap(problem.w, values.numel(), values);
  for_each_range(cpu::convert_tasks(problem), dense_work(problem),
                 [&p = problem](int64_t begin, int64_t end) { cpu::unpack(p, begin, end); });
  return dense;
}

Tensor plan_units(const Tensor& blk_ptr, const Tensor& blk_pad, int64_t mb, int64_t kb) {
  CSB_CHECK(mb >= 0 && kb >= 0, "mb, kb: expected non-negative sizes, got ", mb, " and ", kb);
  CSB_CHECK(blk_ptr.scalar_type() == ScalarType::Int && blk_ptr.is_contiguous() && blk_ptr.numel() == mb * kb + 1,
            "blk_ptr: expected ", mb * kb + 1, " contiguous int32 elements, got ", blk_ptr.numel());
  CSB_CHECK(blk_pad.scalar_type() == ScalarType::Byte && blk_pad.is_contiguous() && blk_pad.numel() == mb * kb,
            "blk_pad: expected ", mb * kb, " contiguous uint8 elements, got ", blk_pad.numel());
  const plan::Units units =
      plan::plan_units(static_cast<const int32_t*>(blk_ptr.data_ptr()), static_cast<const uint8_t*>(blk_pad.data_ptr()),
                       static_cast<int32_t>(mb), static_cast<int32_t>(kb));
  Tensor result = torch::stable::new_empty(blk_ptr, {2, int64_t{units.num_units} + 1});
  int32_t* out = static_cast<int32_t*>(result.data_ptr());
  out = std::copy(units.row_major.begin(), units.row_major.end(), out);
  std::copy(units.column_major.begin(), units.column_major.end(), out);
  return result;
}

}  // namespace
}  // namespace csb::border

STABLE_TORCH_LIBRARY_IMPL(torch_csb, CPU, library) {
  using namespace csb::border;
  library.impl("spmm", TORCH_BOX(&spmm));
  library.impl("spmm_t", TORCH_BOX(&spmm_t));
  library.impl("sddmm", TORCH_BOX(&sddmm));
  library.impl("count", TORCH_BOX(&count));
  library.impl("pack", TORCH_BOX(&pack));
  library.impl("unpack", TORCH_BOX(&unpack));
  library.impl("pack_bitmap", TORCH_BOX(&pack_bitmap));
  library.impl("to_codes", TORCH_BOX(&to_codes));
  library.impl("plan", TORCH_BOX(&plan_units));
}
