#pragma once

#include "csb/problem.h"
#include "plan/cpu_config.h"

namespace csb::cpu {

// Y = act(op(W) . X + bias). Run every task of [0, spmm_tasks()) once, in ranges on any threads; then, if
// join_tasks() > 0, every task of [0, join_tasks()). The bits of Y depend neither on the ranges nor on the threads.
// x and y have p.y.columns columns and must not overlap. Config is plan::choose_cpu_spmm's: tile_n is 1, 4, 8, 16, 32
// or 64. p.partials may be null unless config.split_strips and num_units > 1.
int64_t spmm_tasks(const SpmmProblem& p, const plan::CpuSpmmConfig& config);
void spmm(const SpmmProblem& p, const plan::CpuSpmmConfig& config, int64_t begin, int64_t end);

int64_t join_tasks(const SpmmProblem& p, const plan::CpuSpmmConfig& config);
void join(const SpmmProblem& p, const plan::CpuSpmmConfig& config, int64_t begin, int64_t end);

}  // namespace csb::cpu
