#include "cuda/device/launch.cuh"
#include "cuda/panel/kernels.h"
#include "cuda/panel/panel.h"

namespace csb::cuda {
namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool allowed(const PanelProblem& problem) {
  return problem.w.block_shift >= 4 && problem.w.block_shift <= 8 && problem.ld % 8 == 0 && aligned(problem.panel) &&
         aligned(problem.values) && aligned(problem.w.codes);
}

// Panels are not for float64.
template <typename F>
cudaError_t dispatch_narrow(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return f(TypeTag<__half>{});
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t unpack_panel(const PanelProblem& problem, cudaStream_t stream) {
  if (!allowed(problem)) return cudaErrorInvalidValue;
  if (problem.element_size == 2) return launch_unpack_panel<uint16_t>(problem, stream);
  if (problem.element_size == 4) return launch_unpack_panel<uint32_t>(problem, stream);
  return cudaErrorInvalidValue;
}

cudaError_t sample_panel(const PanelProblem& problem, cudaStream_t stream) {
  if (!allowed(problem)) return cudaErrorInvalidValue;
  if (problem.element_size == 2) return launch_sample_panel<uint16_t>(problem, stream);
  if (problem.element_size == 4) return launch_sample_panel<uint32_t>(problem, stream);
  return cudaErrorInvalidValue;
}

cudaError_t fill_bias(const EpilogueProblem& problem, cudaStream_t stream) {
  if (problem.bias == nullptr) return cudaSuccess;
  return dispatch_narrow(problem.dtype,
                         [&](auto tag) { return launch_fill_bias<typename decltype(tag)::type>(problem, stream); });
}

cudaError_t activate_in_place(const EpilogueProblem& problem, cudaStream_t stream) {
  if (problem.activation == Activation::kNone) return cudaSuccess;
  return dispatch_narrow(problem.dtype,
                         [&](auto tag) { return launch_activate<typename decltype(tag)::type>(problem, stream); });
}

}  // namespace csb::cuda
