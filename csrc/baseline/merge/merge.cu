#include "baseline/merge/merge.cuh"
#include "baseline/merge/merge.h"
#include "cuda/device/launch.cuh"

namespace csb::baseline {
namespace {

constexpr int64_t kScratchBytes = int64_t(64) << 20;
constexpr int64_t kMinEntries = 64;     // below, searching for rows and the fix-up cost more than they even out
constexpr int64_t kMaxEntries = 1024;   // above, the last shares to finish are noticed
constexpr int64_t kWantedWarps = 8192;  // about all that the largest devices hold at once
constexpr int64_t kStripColumns = 128;  // that a warp takes, roughly

int64_t acc_bytes(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

MergeShares choose_shares(const CsrSpmmProblem& problem) {
  const int64_t nnz = problem.w.nnz;
  if (nnz == 0 || problem.n == 0) return {1, 0};
  const int64_t even = nnz * ceil_div(problem.n, kStripColumns) / kWantedWarps;
  const int64_t affordable = max_of<int64_t>(kScratchBytes / (2 * problem.n * acc_bytes(problem.dtype)), 1);
  const int64_t balanced = min_of(max_of(even, kMinEntries), kMaxEntries);
  const int64_t entries = min_of(max_of(balanced, ceil_div(nnz, affordable)), nnz);
  return {static_cast<int32_t>(entries), static_cast<int32_t>(ceil_div(nnz, entries))};
}

template <typename T, int kVec>
cudaError_t launch_shares(const CsrSpmmProblem& problem, const MergeShares& shares, cudaStream_t stream) {
  const LaneMap map = choose_lanes(problem.n / kVec, problem.w);
  const int64_t strips = ceil_div<int64_t>(problem.n, int64_t(map.lanes()) * kVec);
  const dim3 grid(static_cast<unsigned>(ceil_div(shares.count, map.groups_per_block())),
                  static_cast<unsigned>(min_of(strips, kMaxGridY)));
  const auto kernel = map.lane_bits == kWarpBits ? merge_kernel<T, kVec, true> : merge_kernel<T, kVec, false>;
  return cuda::launch(kernel, grid, dim3(kThreads), 0, stream, problem, shares, map);
}

template <typename T>
cudaError_t launch_fix_up(const CsrSpmmProblem& problem, const MergeShares& shares, cudaStream_t stream) {
  LaneMap map = {0, kWarpBits};
  while (map.split_bits > 0 && map.lanes() < problem.n) map = {map.lane_bits + 1, map.split_bits - 1};
  const int64_t items = max_of(shares.count - 1, 0) + ceil_div<int64_t>(problem.w.m, kWarpSize);
  const int64_t tiles = ceil_div<int64_t>(problem.n, kFixUpColumns);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(items, kThreads / kWarpSize)),
                  static_cast<unsigned>(min_of(tiles, kMaxGridY)));
  return cuda::launch(merge_fix_up_kernel<T>, grid, dim3(kThreads), 0, stream, problem, shares, map);
}

}  // namespace

size_t merge_scratch_bytes(const CsrSpmmProblem& problem) {
  return static_cast<size_t>(2 * choose_shares(problem).count * problem.n * acc_bytes(problem.dtype));
}

cudaError_t merge(const CsrSpmmProblem& problem, cudaStream_t stream) {
  if (problem.w.m == 0 || problem.n == 0) return cudaSuccess;
  const MergeShares shares = choose_shares(problem);
  if (shares.count > 0 && problem.scratch == nullptr) return cudaErrorInvalidValue;
  return cuda::dispatch_dtype(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(problem.x) | reinterpret_cast<uintptr_t>(problem.y) |
                                static_cast<uintptr_t>(problem.n) * sizeof(T);
    const cudaError_t error = dispatch_vector<T>(
        addresses, [&](auto vec) { return launch_shares<T, decltype(vec)::value>(problem, shares, stream); });
    return error == cudaSuccess ? launch_fix_up<T>(problem, shares, stream) : error;
  });
}

}  // namespace csb::baseline
