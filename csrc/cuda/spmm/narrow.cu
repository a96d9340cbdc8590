#include "cuda/device/operand_tile.cuh"
#include "cuda/spmm/narrow.h"

namespace csb::cuda {

bool narrow_fits(const SpmmProblem& problem) {
  return problem.w.block_shift == 6 && reinterpret_cast<uintptr_t>(problem.values) % 16 == 0 &&
         problem.in_features() % 8 == 0 && operand_vectorized(problem.x, false);
}

}  // namespace csb::cuda
