#include "cuda/convert/convert.h"
#include "cuda/convert/kernels.h"
#include "cuda/convert/to_codes.cuh"
#include "cuda/device/launch.cuh"

namespace csb::cuda {

cudaError_t count(const ConvertProblem& problem, cudaStream_t stream) {
  return dispatch_dtype(problem.dtype,
                        [&](auto tag) { return launch_count<typename decltype(tag)::type>(problem, stream); });
}

cudaError_t pack(const ConvertProblem& problem, cudaStream_t stream) {
  return dispatch_dtype(problem.dtype,
                        [&](auto tag) { return launch_pack<typename decltype(tag)::type>(problem, stream); });
}

cudaError_t pack_bitmap(const ConvertProblem& problem, cudaStream_t stream) {
  return dispatch_dtype(problem.dtype,
                        [&](auto tag) { return launch_pack_bitmap<typename decltype(tag)::type>(problem, stream); });
}

cudaError_t to_codes(const ConvertProblem& problem, cudaStream_t stream) {
  const int32_t blocks = ceil_div(problem.w.num_blocks(), kToCodesWarps);
  return launch(to_codes_kernel, dim3(blocks), dim3(32 * kToCodesWarps), 0, stream, problem);
}

cudaError_t unpack(const ConvertProblem& problem, cudaStream_t stream) {
  return dispatch_dtype(problem.dtype,
                        [&](auto tag) { return launch_unpack<typename decltype(tag)::type>(problem, stream); });
}

}  // namespace csb::cuda
