#include "baseline/row_split/row_split.cuh"
#include "baseline/row_split/row_split.h"
#include "cuda/device/launch.cuh"

namespace csb::baseline {
namespace {

template <typename T, int kVec>
cudaError_t launch_row_split(const CsrSpmmProblem& problem, cudaStream_t stream) {
  const LaneMap map = choose_lanes(problem.n / kVec, problem.w);
  const int64_t strips = ceil_div<int64_t>(problem.n, int64_t(map.lanes()) * kVec);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(problem.w.m, map.groups_per_block())),
                  static_cast<unsigned>(min_of(strips, kMaxGridY)));
  const auto kernel = map.lane_bits == kWarpBits ? row_split_kernel<T, kVec, true> : row_split_kernel<T, kVec, false>;
  return cuda::launch(kernel, grid, dim3(kThreads), 0, stream, problem, map);
}

}  // namespace

cudaError_t row_split(const CsrSpmmProblem& problem, cudaStream_t stream) {
  if (problem.w.m == 0 || problem.n == 0) return cudaSuccess;
  return cuda::dispatch_dtype(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(problem.x) | reinterpret_cast<uintptr_t>(problem.y) |
                                static_cast<uintptr_t>(problem.n) * sizeof(T);
    return dispatch_vector<T>(addresses,
                              [&](auto vec) { return launch_row_split<T, decltype(vec)::value>(problem, stream); });
  });
}

}  // namespace csb::baseline
