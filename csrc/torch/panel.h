#pragma once

#include "plan/panel.h"
#include "torch/launch.h"
#include "torch/operands.h"

// Products with a panel of W at a time: our kernels expand or sample the panel, cuBLAS multiplies.
// Extra memory: one panel, given back at the end.
namespace csb::border {

// What the planner needs to know; `stored` is the number of W's entries.
plan::PanelOffer panel_offer(const SpmmProblem& problem, int64_t stored);
plan::PanelOffer panel_offer(const SddmmProblem& problem);

// Y = act(op(W) . X + bias) and the sampled A . B^T, `features` of W at a time, for a problem whose
// offer fits.
void spmm_by_panels(const SpmmCall& call, const Tensor& values, int32_t features, const Launch& launch);
void sddmm_by_panels(const SddmmCall& call, int32_t features, const Launch& launch);

}  // namespace csb::border
