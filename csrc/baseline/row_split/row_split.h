#pragma once

#include <cuda_runtime.h>

#include "baseline/csr.h"

namespace csb::baseline {

// Y = W . X on the current device, any dtype.
cudaError_t row_split(const CsrSpmmProblem& problem, cudaStream_t stream);

}  // namespace csb::baseline
