#include "cuda/convert/convert.h"
#include "cuda/convert/kernels.h"
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

cudaError_t unpack(const ConvertProblem& problem, cudaStream_t stream) {
  return dispatch_dtype(problem.dtype,
                        [&](auto tag) { return launch_unpack<typename decltype(tag)::type>(problem, stream); });
}

}  // namespace csb::cuda
