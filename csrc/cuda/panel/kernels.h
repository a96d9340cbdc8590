#pragma once

#include <cuda_runtime.h>

#include "csb/panel.h"

namespace csb::cuda {

// The panel's kernels move bits, so an unsigned type stands for every dtype of its size. Instantiated in
// instantiations/.
template <typename Bits>
cudaError_t launch_unpack_panel(const PanelProblem& problem, cudaStream_t stream);
template <typename Bits>
cudaError_t launch_sample_panel(const PanelProblem& problem, cudaStream_t stream);
template <typename Bits>
cudaError_t launch_unpack_bitmap_panel(const PanelProblem& problem, cudaStream_t stream);
template <typename Bits>
cudaError_t launch_sample_bitmap_panel(const PanelProblem& problem, cudaStream_t stream);
template <typename T>
cudaError_t launch_fill_bias(const EpilogueProblem& problem, cudaStream_t stream);
template <typename T>
cudaError_t launch_activate(const EpilogueProblem& problem, cudaStream_t stream);

}  // namespace csb::cuda
