#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/panel/kernels.h"
#include "cuda/panel/panel.cuh"

namespace csb::cuda {

inline cudaError_t launch_panel(void (*kernel)(PanelProblem), const PanelProblem& problem, cudaStream_t stream) {
  const int64_t tiles = PanelTile(problem.w.block_shift).tiles(problem);
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(kernel, dim3(static_cast<uint32_t>(tiles)), dim3(kPanelThreads), 0, stream, problem);
}

template <typename Bits>
cudaError_t launch_unpack_panel(const PanelProblem& problem, cudaStream_t stream) {
  return launch_panel(unpack_panel_kernel<Bits, kPanelThreads, kUnpackRuns>, problem, stream);
}

template <typename Bits>
cudaError_t launch_sample_panel(const PanelProblem& problem, cudaStream_t stream) {
  return launch_panel(sample_panel_kernel<Bits, kPanelThreads>, problem, stream);
}

}  // namespace csb::cuda
