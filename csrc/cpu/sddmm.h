#pragma once

#include "csb/problem.h"
#include "plan/cpu_config.h"

namespace csb::cpu {

// grad_values = (A . B^T) sampled at W's pattern. Run every task of [0, sddmm_tasks()) once, in ranges on any threads;
// then, if sddmm_join_tasks() > 0, every task of [0, sddmm_join_tasks()). p.column_splits must be config.column_splits.
// The bits of the result depend neither on the ranges nor on the threads.
int64_t sddmm_tasks(const SddmmProblem& p, const plan::CpuSddmmConfig& config);
void sddmm(const SddmmProblem& p, const plan::CpuSddmmConfig& config, int64_t begin, int64_t end);

int64_t sddmm_join_tasks(const SddmmProblem& p, const plan::CpuSddmmConfig& config);
void sddmm_join(const SddmmProblem& p, const plan::CpuSddmmConfig& config, int64_t begin, int64_t end);

}  // namespace csb::cpu
