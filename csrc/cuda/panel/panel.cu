#include "cuda/device/launch.cuh"
#include "cuda/panel/kernels.h"
#include "cuda/panel/panel.h"

namespace csb::cuda {
namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool allowed(const PanelProblem& problem) {
  return problem.w.block_shift >= 4 && problem.w.block_shift <= 8 && problem.ld % 8 == 0 && aligned(problem.panel) &&
         aligned(problem.values) && aligned(problem.w.codes) && aligned(problem.w.bitmap);
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

template <typename F>
cudaError_t dispatch_bits(int32_t element_size, F&& f) {
  if (element_size == 2) return f(TypeTag<uint16_t>{});
  if (element_size == 4) return f(TypeTag<uint32_t>{});
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t unpack_panel(const PanelProblem& problem, cudaStream_t stream) {
  if (!allowed(problem)) return cudaErrorInvalidValue;
  return dispatch_bits(problem.element_size, [&](auto tag) {
    using Bits = typename decltype(tag)::type;
    return problem.w.bitmap != nullptr ? launch_unpack_bitmap_panel<Bits>(problem, stream)
                                       : launch_unpack_panel<Bits>(problem, stream);
  });
}

cudaError_t sample_panel(const PanelProblem& problem, cudaStream_t stream) {
  if (!allowed(problem)) return cudaErrorInvalidValue;
  return dispatch_bits(problem.element_size, [&](auto tag) {
    using Bits = typename decltype(tag)::type;
    return problem.w.bitmap != nullptr ? launch_sample_bitmap_panel<Bits>(problem, stream)
                                       : launch_sample_panel<Bits>(problem, stream);
  });
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
