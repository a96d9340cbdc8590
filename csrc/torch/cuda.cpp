#ifdef TORCH_CSB_WITH_CUDA

#include <torch/csrc/stable/library.h>

#include "cuda/convert/convert.h"
#include "cuda/sddmm/sddmm.h"
#include "cuda/spmm/spmm.h"
#include "torch/launch.h"
#include "torch/operands.h"
#include "torch/panel.h"

namespace csb::border {
namespace {

// Codes of a bitmap for kernels that read no bitmap. They live as long as the call.
std::optional<Tensor> expand_bitmap(CsbView& w, int64_t stored, const Tensor& like, const Launch& launch) {
  if (w.bitmap == nullptr) return std::nullopt;
  Tensor codes = empty({2 * stored}, ScalarType::Byte, like);
  ConvertProblem problem{};
  problem.w = w;
  problem.codes = static_cast<uint16_t*>(codes.data_ptr());
  check_cuda(cuda::to_codes(problem, launch.stream()), "to_codes");
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
  const Launch launch(call.y);
  plan::CudaSpmmConfig config = plan::choose_cuda_spmm(
      problem.dtype, problem.w.block_shift, problem.strips(), problem.num_units, problem.y.columns, launch.chip(),
      {problem.blocks_per_strip(), cuda::in_pieces(problem), panel_offer(problem, values.numel()),
       problem.w.bitmap != nullptr});
  if (config.kernel == plan::CudaKernel::kPanel) {
    spmm_by_panels(call, values, config.tile_n, launch);
    return call.y;
  }
  std::optional<Tensor> expanded;
  if (config.kernel != plan::CudaKernel::kBitmap) {
    expanded = expand_bitmap(problem.w, values.numel(), values, launch);
  }
  config.split_strips = config.split_strips && problem.num_units > 1;
  if (config.split_strips) allocate_partials(call);
  check_cuda(cuda::spmm(problem, config, launch.stream()), transposed ? "spmm_t" : "spmm");
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
  const Launch launch(call.grad_values);
  const plan::CudaSddmmConfig config =
      plan::choose_cuda_sddmm(problem.dtype, problem.w.block_shift, problem.num_units, problem.a.columns, launch.chip(),
                              {cuda::in_regions(problem), panel_offer(problem)});
  if (config.kernel == plan::CudaKernel::kPanel) {
    sddmm_by_panels(call, config.tile_n, launch);
    return call.grad_values;
  }
  const auto expanded = expand_bitmap(problem.w, stored, a, launch);
  if (config.column_splits > 1) allocate_partials(call, config.column_splits);
  check_cuda(cuda::sddmm(problem, config, launch.stream()), "sddmm");
  return call.grad_values;
}

Tensor count(const Tensor& dense, const std::optional<Tensor>& mask, int64_t block_size) {
  auto [problem, counts] = prepare_count(dense, mask, block_size);
  if (counts.numel() == 0) return counts;
  const Launch launch(dense);
  check_cuda(cuda::count(problem, launch.stream()), "count");
  return counts;
}

std::tuple<Tensor, Tensor> pack(const Tensor& dense, const std::optional<Tensor>& mask, const Tensor& blk_ptr,
                                const Tensor& blk_pad, int64_t block_size, int64_t stored) {
  auto [problem, values, codes] = prepare_pack(dense, mask, blk_ptr, blk_pad, block_size, stored);
  if (stored == 0) return {values, codes};
  const Launch launch(dense);
  check_cuda(cuda::pack(problem, launch.stream()), "pack");
  return {values, codes};
}

std::tuple<Tensor, Tensor> pack_bitmap(const Tensor& dense, const std::optional<Tensor>& mask, const Tensor& blk_ptr,
                                       const Tensor& blk_pad, int64_t stored) {
  auto [problem, values, bitmap] = prepare_pack_bitmap(dense, mask, blk_ptr, blk_pad, stored);
  const Launch launch(dense);
  check_cuda(cuda::pack_bitmap(problem, launch.stream()), "pack_bitmap");
  return {values, bitmap};
}

Tensor to_codes(const Tensor& bitmap, const Tensor& blk_ptr, const Tensor& blk_pad, int64_t m, int64_t k,
                int64_t stored) {
  auto [problem, codes] = prepare_to_codes(bitmap, blk_ptr, blk_pad, m, k, stored);
  const Launch launch(bitmap);
  check_cuda(cuda::to_codes(problem, launch.stream()), "to_codes");
  return codes;
}

Tensor unpack(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad, int64_t m,
              int64_t k, int64_t block_size) {
  auto [problem, dense] = prepare_unpack(values, codes, blk_ptr, blk_pad, m, k, block_size);
  if (dense.numel() == 0) return dense;
  const Launch launch(dense);
  check_cuda(cuda::unpack(problem, launch.stream()), "unpack");
  return dense;
}

}  // namespace
}  // namespace csb::border

STABLE_TORCH_LIBRARY_IMPL(torch_csb, CUDA, library) {
  using namespace csb::border;
  library.impl("spmm", TORCH_BOX(&spmm));
  library.impl("spmm_t", TORCH_BOX(&spmm_t));
  library.impl("sddmm", TORCH_BOX(&sddmm));
  library.impl("count", TORCH_BOX(&count));
  library.impl("pack", TORCH_BOX(&pack));
  library.impl("pack_bitmap", TORCH_BOX(&pack_bitmap));
  library.impl("to_codes", TORCH_BOX(&to_codes));
  library.impl("unpack", TORCH_BOX(&unpack));
}

#endif  // TORCH_CSB_WITH_CUDA
