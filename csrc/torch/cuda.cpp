#ifdef TORCH_CSB_WITH_CUDA

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/convert/convert.h"
#include "cuda/sddmm/sddmm.h"
#include "cuda/spmm/spmm.h"
#include "torch/operands.h"

// Defined by a CUDA build of torch only; weak, so that this library also loads beside a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace csb::border {
namespace {

void check_cuda(cudaError_t status, const char* what) {
  CSB_CHECK(status == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(status));
}

// Makes the tensors' device current and finds its stream for the time of one call.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const int32_t device = tensor.get_device_index();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device attributes");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device), "device attributes");
    CSB_CHECK(major >= 8, "torch_csb needs a GPU of compute capability 8.0 or later, cuda:", device, " has ", major,
              ".x; move the model to the CPU or densify_ it");
  }

  cudaStream_t stream() const { return stream_; }
  int32_t multiprocessors() const { return multiprocessors_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0;
};

Tensor spmm_either(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad,
                   const Tensor& units, const Tensor& x, const std::optional<Tensor>& bias, int64_t m, int64_t k,
                   int64_t block_size, int64_t dim, int64_t activation, bool transposed) {
  SpmmCall call =
      prepare_spmm(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation, transposed);
  SpmmProblem& problem = call.problem;
  if (call.y.numel() == 0) return call.y;
  const Launch launch(call.y);
  plan::CudaSpmmConfig config = plan::choose_cuda_spmm(problem.dtype, problem.w.block_shift, problem.strips(),
                                                       problem.num_units, problem.y.columns, launch.multiprocessors());
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
             const Tensor& b, int64_t m, int64_t k, int64_t block_size, int64_t dim) {
  SddmmCall call = prepare_sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim);
  SddmmProblem& problem = call.problem;
  if (problem.entries == 0) return call.grad_values;
  const Launch launch(call.grad_values);
  const plan::CudaSddmmConfig config = plan::choose_cuda_sddmm(problem.dtype, problem.w.block_shift, problem.num_units,
                                                               problem.a.columns, launch.multiprocessors());
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
  library.impl("unpack", TORCH_BOX(&unpack));
}

#endif  // TORCH_CSB_WITH_CUDA
