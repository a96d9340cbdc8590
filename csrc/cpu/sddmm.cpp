#include "cpu/sddmm.h"

#include "cpu/capability.h"
#include "cpu/tasks.h"

namespace csb::cpu {

int64_t sddmm_tasks(const SddmmProblem& p, const plan::CpuSddmmConfig& config) {
  return p.entries == 0 ? 0 : int64_t{p.num_units} * config.column_splits;
}

void sddmm(const SddmmProblem& p, const plan::CpuSddmmConfig& config, int64_t begin, int64_t end) {
  if (begin < end) kernels().sddmm(p, config, begin, end);
}

int64_t sddmm_join_tasks(const SddmmProblem& p, const plan::CpuSddmmConfig& config) {
  return config.column_splits == 1 ? 0 : ceil_div(p.entries, kSddmmJoinEntries);
}

void sddmm_join(const SddmmProblem& p, const plan::CpuSddmmConfig& config, int64_t begin, int64_t end) {
  if (begin < end) kernels().sddmm_join(p, config, begin, end);
}

}  // namespace csb::cpu
