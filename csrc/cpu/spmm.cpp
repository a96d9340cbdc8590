#include "cpu/spmm.h"

#include "cpu/capability.h"
#include "cpu/tasks.h"

namespace csb::cpu {

int64_t spmm_tasks(const SpmmProblem& p, const plan::CpuSpmmConfig& config) {
  return column_tiles(p.y.columns, config.tile_n) * tasks_per_tile(p, config);
}

void spmm(const SpmmProblem& p, const plan::CpuSpmmConfig& config, int64_t begin, int64_t end) {
  if (begin < end) kernels().spmm(p, config, begin, end);
}

int64_t join_tasks(const SpmmProblem& p, const plan::CpuSpmmConfig& config) {
  return cuts_units(p, config) ? column_tiles(p.y.columns, config.tile_n) * p.strips() : 0;
}

void join(const SpmmProblem& p, const plan::CpuSpmmConfig& config, int64_t begin, int64_t end) {
  if (begin < end) kernels().join(p, config, begin, end);
}

}  // namespace csb::cpu
