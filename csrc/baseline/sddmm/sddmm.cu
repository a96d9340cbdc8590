#include "baseline/sddmm/sddmm.cuh"
#include "baseline/sddmm/sddmm.h"
#include "cuda/device/launch.cuh"

namespace csb::baseline {
namespace {

// Lanes are columns of A and B; splits take different entries of a row. A group without splits works
// on a batch of entries at a time, so rows are long when every split gets a batch of its own.
LaneMap choose_sddmm_lanes(int64_t vectors, const CsrView& w) {
  LaneMap map = {0, 0};
  while (map.lane_bits < kWarpBits && map.lanes() < vectors) ++map.lane_bits;
  const auto slots = [&] { return round_up<int64_t>(vectors, map.lanes()); };
  // At most a quarter of the lanes idle.
  while (vectors > map.lanes() && 3 * slots() > 4 * vectors) --map.lane_bits;
  const int64_t row_entries = w.nnz / max_of(w.m, 1);
  while (map.group_bits() < kWarpBits && map.splits() * kSddmmBatch <= row_entries) ++map.split_bits;
  return map;
}

MergeShares choose_sddmm_shares(const CsrView& w, const LaneMap& map) {
  constexpr int64_t kWantedWarps = 8192;  // a few times what the largest devices hold at once
  constexpr int64_t kMinBatches = 2;      // below, searching for rows is noticed
  constexpr int64_t kMaxBatches = 32;     // above, so are the last shares to finish
  if (w.nnz == 0) return {1, 0};
  const int64_t batch = int64_t(kSddmmBatch) << map.split_bits;
  const int64_t groups = kWantedWarps << (kWarpBits - map.group_bits());
  const int64_t even = ceil_div<int64_t>(w.nnz, groups);
  const int64_t entries = min_of(max_of(even, kMinBatches * batch), kMaxBatches * batch);
  return {static_cast<int32_t>(entries), static_cast<int32_t>(ceil_div<int64_t>(w.nnz, entries))};
}

template <typename T, int kVec>
cudaError_t launch_sddmm(const CsrSddmmProblem& problem, cudaStream_t stream) {
  const LaneMap map = choose_sddmm_lanes(problem.n / kVec, problem.w);
  const MergeShares shares = choose_sddmm_shares(problem.w, map);
  const dim3 grid(static_cast<unsigned>(ceil_div(shares.count, map.groups_per_block())));
  return cuda::launch(sddmm_kernel<T, kVec>, grid, dim3(kThreads), 0, stream, problem, shares, map);
}

}  // namespace

// Without columns every gradient is zero, and has to be written.
cudaError_t csr_sddmm(const CsrSddmmProblem& problem, cudaStream_t stream) {
  return cuda::dispatch_dtype(problem.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(problem.a) | reinterpret_cast<uintptr_t>(problem.b) |
                                static_cast<uintptr_t>(problem.n) * sizeof(T);
    return dispatch_vector<T>(addresses,
                              [&](auto vec) { return launch_sddmm<T, decltype(vec)::value>(problem, stream); });
  });
}

}  // namespace csb::baseline
