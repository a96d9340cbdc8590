#include "cuda/device/launch.cuh"
#include "cuda/sddmm/gather.h"
#include "cuda/sddmm/join.cuh"
#include "cuda/sddmm/region.h"
#include "cuda/sddmm/sddmm.h"
#include "cuda/sddmm/tile.h"

namespace csb::cuda {
namespace {

cudaError_t launch_kernel(const SddmmProblem& problem, const plan::CudaSddmmConfig& config, cudaStream_t stream) {
  switch (config.kernel) {
    case plan::CudaKernel::kGather:
      return dispatch_dtype(problem.dtype, [&](auto tag) {
        return launch_sddmm_gather<typename decltype(tag)::type>(problem, config, stream);
      });
    case plan::CudaKernel::kTile:
      return launch_sddmm_tile(problem, config, stream);
    case plan::CudaKernel::kRegion:
      return launch_sddmm_region(problem, config, stream);
    case plan::CudaKernel::kPanel:
      break;  // a product of the library, which the border calls
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_join(const SddmmProblem& problem, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(problem.entries, kSddmmJoinThreads)));
  return dispatch_dtype(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(sddmm_join_kernel<T>, grid, dim3(kSddmmJoinThreads), 0, stream, problem);
  });
}

}  // namespace

bool in_regions(const SddmmProblem& problem) { return region_fits(problem); }

cudaError_t sddmm(const SddmmProblem& problem, const plan::CudaSddmmConfig& config, cudaStream_t stream) {
  if (problem.entries == 0) return cudaSuccess;
  if (problem.column_splits != config.column_splits) return cudaErrorInvalidValue;
  if (problem.column_splits > 1 && problem.partials == nullptr) return cudaErrorInvalidValue;
  const cudaError_t error = launch_kernel(problem, config, stream);
  if (error != cudaSuccess || problem.column_splits == 1) return error;
  return launch_join(problem, stream);
}

}  // namespace csb::cuda
