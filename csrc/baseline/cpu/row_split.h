#pragma once

#include "baseline/csr.h"

// Y = W . X on CPUs: each row of W by one thread, as Yang, Buluc, Owens ("Design principles for sparse matrix
// multiplication on the GPU", Euro-Par 2018) name it.
namespace csb::baseline::cpu {

// Rows [begin, end) of W, in their own order. Several threads may each take a range.
void row_split(const CsrSpmmProblem& problem, int64_t begin, int64_t end);

}  // namespace csb::baseline::cpu
