#pragma once

#include <type_traits>

#include "cuda/device/launch.cuh"
#include "cuda/panel/bitmap.cuh"
#include "cuda/panel/kernels.h"
#include "cuda/panel/panel.cuh"

namespace csb::cuda {

template <int kBlockShift>
cudaError_t launch_panel(void (*kernel)(PanelProblem), const PanelProblem& problem, cudaStream_t stream) {
  using Tile = PanelTile<kBlockShift>;
  const int64_t tiles = ceil_div<int64_t>(problem.block_cols, Tile::kBlocks) * problem.block_rows * Tile::kSlices;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3(static_cast<uint32_t>(tiles)), dim3(kPanelThreads), 0, stream, problem);
}

// Calls f(std::integral_constant<int, block_shift>{}). F returns cudaError_t.
template <typename F>
cudaError_t dispatch_block_shift(int32_t block_shift, F&& f) {
  switch (block_shift) {
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 6:
      return f(std::integral_constant<int, 6>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
  }
  return cudaErrorInvalidValue;
}

template <typename Bits>
cudaError_t launch_unpack_panel(const PanelProblem& problem, cudaStream_t stream) {
  return dispatch_block_shift(problem.w.block_shift, [&](auto shift) {
    return launch_panel<shift.value>(unpack_panel_kernel<Bits, shift.value>, problem, stream);
  });
}

template <typename Bits>
cudaError_t launch_sample_panel(const PanelProblem& problem, cudaStream_t stream) {
  return dispatch_block_shift(problem.w.block_shift, [&](auto shift) {
    return launch_panel<shift.value>(sample_panel_kernel<Bits, shift.value>, problem, stream);
  });
}

inline cudaError_t launch_bitmap_panel(void (*kernel)(PanelProblem), const PanelProblem& problem, cudaStream_t stream) {
  const int64_t blocks = int64_t{problem.block_rows} * problem.block_cols;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3(static_cast<uint32_t>(blocks)), dim3(kBitmapPanelThreads), 0, stream, problem);
}

template <typename Bits>
cudaError_t launch_unpack_bitmap_panel(const PanelProblem& problem, cudaStream_t stream) {
  return launch_bitmap_panel(unpack_bitmap_panel_kernel<Bits>, problem, stream);
}

template <typename Bits>
cudaError_t launch_sample_bitmap_panel(const PanelProblem& problem, cudaStream_t stream) {
  return launch_bitmap_panel(sample_bitmap_panel_kernel<Bits>, problem, stream);
}

}  // namespace csb::cuda
