#pragma once

#include <cuda_runtime.h>

#include "baseline/csr.h"

namespace csb::baseline {

// grad_values[e] = sum_j A[row(e), j] * B[col(e), j] on the current device, any dtype.
cudaError_t csr_sddmm(const CsrSddmmProblem& problem, cudaStream_t stream);

}  // namespace csb::baseline
