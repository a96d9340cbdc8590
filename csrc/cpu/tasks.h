#pragma once

#include "csb/problem.h"
#include "plan/cpu_config.h"

namespace csb::cpu {

// How the work of a problem is cut into tasks. Tasks are numbered with the column tile (the column split of an SDDMM)
// outermost, so that a range of tasks meets the same columns again and packs them once.

inline int64_t column_tiles(int64_t columns, int32_t tile_n) { return ceil_div<int64_t>(columns, tile_n); }

// Without blocks (in_features = 0) there are strips to fill but no positions to cut.
inline bool cuts_units(const SpmmProblem& p, const plan::CpuSpmmConfig& config) {
  return config.split_strips && p.num_units > 1 && p.blocks_per_strip() > 0;
}

inline int64_t tasks_per_tile(const SpmmProblem& p, const plan::CpuSpmmConfig& config) {
  return cuts_units(p, config) ? p.num_units : p.strips();
}

constexpr int64_t kSddmmJoinEntries = 8192;  // a task of the SDDMM join

}  // namespace csb::cpu
