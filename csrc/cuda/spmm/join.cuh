#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/device/launch.cuh"

namespace csb::cuda {

constexpr int kJoinThreads = 256;

// First unit u with units[u + 1] > position, or num_units: a 32-ary search by the whole warp, since
// each round is a dependent load.
__device__ __forceinline__ int32_t unit_of(const int32_t* units, int32_t num_units, int32_t position) {
  int32_t low = 0;
  int32_t high = num_units;
  while (low < high) {
    const int32_t step = (high - low + 31) / 32;
    const int32_t probe = low + static_cast<int32_t>(threadIdx.x % 32) * step;
    const bool below = probe < high && units[probe + 1] <= position;
    const int32_t below_count = __popc(__ballot_sync(0xffffffffu, below));
    if (below_count == 0) return low;
    high = min_of(high, low + below_count * step);
    low = low + (below_count - 1) * step + 1;
  }
  return low;
}

// Grid: x = output strip; y = runs of kJoinThreads elements of the strip, folded at the grid's limit.
//
// Adds the slots of a strip that several units share, in unit order. A unit has a share when it
// holds a block position of the strip; a unit without positions wrote nothing.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads) join_kernel(const __grid_constant__ SpmmProblem problem) {
  using Acc = AccOf<T>;

  // Phase 1: the units of this strip.
  const int32_t strip = blockIdx.x;
  const int32_t strip_begin = strip * problem.blocks_per_strip();
  const int32_t strip_end = strip_begin + problem.blocks_per_strip();
  const int32_t first = unit_of(problem.units, problem.num_units, strip_begin);
  const int32_t last = unit_of(problem.units, problem.num_units, strip_end - 1);
  const auto in_use = [&](int32_t unit) { return problem.units[unit] < problem.units[unit + 1]; };
  const int32_t probe = first + static_cast<int32_t>(threadIdx.x % 32);
  const unsigned first_used = __ballot_sync(0xffffffffu, probe <= last && in_use(probe));
  wait_for_previous_kernel();
  if (first == last) return;

  // Phase 2: their sum, element by element.
  const int32_t block_size = problem.w.block_size();
  const int64_t columns = problem.y.columns;
  const int32_t out_begin = strip * block_size;
  const int64_t elements = min_of(block_size, problem.out_features() - out_begin) * columns;
  const Epilogue<T> epilogue = epilogue_of<T>(problem);
  T* y = static_cast<T*>(problem.y.data);
  for (int64_t e = int64_t(blockIdx.y) * kJoinThreads + threadIdx.x; e < elements;
       e += int64_t(gridDim.y) * kJoinThreads) {
    const Acc* partial = static_cast<const Acc*>(problem.partials) + int64_t(strip) * block_size * columns + e;
    Acc sum = 0;
#pragma unroll 8
    for (int32_t unit = first; unit <= last; ++unit) {
      const bool used = unit - first < 32 ? first_used >> (unit - first) & 1 : in_use(unit);
      if (used) sum += partial[unit * (block_size * columns)];
    }

    // Phase 3: the epilogue.
    const int32_t feature = out_begin + static_cast<int32_t>(e / columns);
    y[feature * problem.y.stride_f + problem.y.column_offset(e % columns)] =
        epilogue.finish(sum, epilogue.bias_of(feature));
  }
}

}  // namespace csb::cuda
