#pragma once

#include "baseline/csr.h"

// The entries of A . B^T that W stores, on CPUs: a dot product of two rows for each.
namespace csb::baseline::cpu {

// Rows [begin, end) of W, in their own order. Several threads may each take a range.
void sddmm(const CsrSddmmProblem& problem, int64_t begin, int64_t end);

}  // namespace csb::baseline::cpu
