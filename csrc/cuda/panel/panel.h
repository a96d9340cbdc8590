#pragma once

#include <cuda_runtime.h>

#include "csb/panel.h"

// What stands around a dense product with a panel of W. Enqueue only. Anything that PanelProblem does
// not allow is cudaErrorInvalidValue.
namespace csb::cuda {

// Every element of the panel, stored or zero.
cudaError_t unpack_panel(const PanelProblem& problem, cudaStream_t stream);

// values[e] = panel element of every entry e in the rectangle, 0 for padding.
cudaError_t sample_panel(const PanelProblem& problem, cudaStream_t stream);

// Y = bias, for a product that is added to it; nothing without a bias.
cudaError_t fill_bias(const EpilogueProblem& problem, cudaStream_t stream);

// Y = act(Y + bias); nothing without an activation.
cudaError_t activate_in_place(const EpilogueProblem& problem, cudaStream_t stream);

}  // namespace csb::cuda
