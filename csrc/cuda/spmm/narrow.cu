#include "cuda/device/operand_tile.cuh"
#include "cuda/spmm/narrow.h"

namespace csb::cuda {

namespace {

bool one_run(const DenseView& view) { return view.size[0] == 1 && view.size[1] == 1; }

}  // namespace

bool narrow_fits(const SpmmProblem& problem) {
  return problem.w.block_shift == 6 && reinterpret_cast<uintptr_t>(problem.values) % 16 == 0 &&
         problem.in_features() % 8 == 0 && one_run(problem.x) && one_run(problem.y) &&
         operand_vectorized(problem.x, false);
}

}  // namespace csb::cuda
