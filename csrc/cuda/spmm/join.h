#pragma once

#include <cuda_runtime.h>

#include "csb/problem.h"

namespace csb::cuda {

// Finishes the strips that several units share: adds their slots of problem.partials in unit order,
// then bias, activation and the store to y. Strips inside one unit are left alone. Every kernel
// that leaves partials shares it.
cudaError_t launch_join(const SpmmProblem& problem, cudaStream_t stream);

}  // namespace csb::cuda
