#include "cuda/device/launch.cuh"
#include "cuda/sddmm/region.cuh"
#include "cuda/sddmm/region.h"

namespace csb::cuda {
namespace {

template <VectorAccess kAccess>
cudaError_t launch_access(const SddmmProblem& problem, const plan::CudaSddmmConfig& config, cudaStream_t stream) {
  using Config = SddmmRegionConfig;
  static_assert(sizeof(SddmmRegionShared) <= plan::kRegionSharedBytes, "the planner asks the chip for as much");
  static_assert(Config::kRegion == plan::kRegionFeatures, "the planner counts regions");
  const int32_t regions_m = ceil_div(problem.w.m, Config::kRegion);
  const int32_t regions_k = ceil_div(problem.w.k, Config::kRegion);
  const int64_t regions = int64_t{regions_m} * regions_k;
  if (regions > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(regions), static_cast<unsigned>(problem.column_splits),
                  static_cast<unsigned>(config.shares));
  return launch(sddmm_region_kernel<kAccess>, grid, dim3(Config::kThreads), sizeof(SddmmRegionShared), stream, problem,
                SddmmRegionLaunch{regions_k});
}

}  // namespace

bool region_fits(const SddmmProblem& problem) {
  return problem.dtype == DType::kFloat32 && problem.w.block_shift == 6 && aligned_to(problem.w.codes, 16);
}

cudaError_t launch_sddmm_region(const SddmmProblem& problem, const plan::CudaSddmmConfig& config, cudaStream_t stream) {
  if (!region_fits(problem)) return cudaErrorInvalidValue;
  const VectorAccess access = vector_access(problem.a, problem.w.m);
  if (access == vector_access(problem.b, problem.w.k)) {
    if (access == VectorAccess::kFeatures) return launch_access<VectorAccess::kFeatures>(problem, config, stream);
    if (access == VectorAccess::kColumns) return launch_access<VectorAccess::kColumns>(problem, config, stream);
  }
  return launch_access<VectorAccess::kNone>(problem, config, stream);
}

}  // namespace csb::cuda
