#include "cuda/device/launch.cuh"
#include "cuda/spmm/narrow.h"
#include "cuda/spmm/narrow_float.cuh"

namespace csb::cuda {
namespace {

template <bool kTransposed, bool kVectors>
cudaError_t launch_kernel(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  using Kernel = NarrowFloat<kTransposed, kVectors>;
  const int32_t cluster = config.split_strips ? 1 : config.cluster;
  const WarpLaunch how = {config.split_strips, cluster};
  const int32_t items = config.split_strips ? problem.num_units : problem.strips();
  const int64_t tiles = ceil_div<int64_t>(problem.y.columns, 8);
  return launch_dependent(narrow_float_kernel<kTransposed, kVectors>,
                          dim3(static_cast<uint32_t>(items * cluster), static_cast<uint32_t>(tiles)),
                          dim3(Kernel::kThreads), sizeof(typename Kernel::Shared), cluster, stream, problem, how);
}

bool vectorized(const DenseView& x, int32_t features) {
  return x.stride_f == 1 && x.size[0] == 1 && x.size[1] == 1 && x.stride[2] % 4 == 0 && features % 4 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

}  // namespace

cudaError_t launch_narrow_float32(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  if (!narrow_fits(problem) || problem.y.columns > plan::narrow_columns(DType::kFloat32)) return cudaErrorInvalidValue;
  if (vectorized(problem.x, problem.in_features())) {
    return problem.transposed ? launch_kernel<true, true>(problem, config, stream)
                              : launch_kernel<false, true>(problem, config, stream);
  }
  return problem.transposed ? launch_kernel<true, false>(problem, config, stream)
                            : launch_kernel<false, false>(problem, config, stream);
}

}  // namespace csb::cuda
