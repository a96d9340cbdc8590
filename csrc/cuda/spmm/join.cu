#include "cuda/device/launch.cuh"
#include "cuda/spmm/join.cuh"
#include "cuda/spmm/join.h"

namespace csb::cuda {

cudaError_t launch_join(const SpmmProblem& problem, cudaStream_t stream) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t elements = problem.w.block_size() * problem.y.columns;
  const int64_t runs = ceil_div<int64_t>(elements, kJoinThreads);
  const dim3 grid(static_cast<unsigned>(problem.strips()), static_cast<unsigned>(min_of(runs, kMaxGridY)));
  return dispatch_dtype(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_dependent(join_kernel<T>, grid, dim3(kJoinThreads), 0, 1, stream, problem);
  });
}

}  // namespace csb::cuda
