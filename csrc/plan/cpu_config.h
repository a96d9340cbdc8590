#pragma once

#include "csb/problem.h"

namespace csb::plan {

struct CpuSpmmConfig {
  int32_t tile_n;     // columns a task computes at once
  bool split_strips;  // a task is one unit (strips may be shared and joined), else one whole strip
  const char* reason;
};

struct CpuSddmmConfig {
  int32_t tile_n;
  int32_t column_splits;
  const char* reason;
};

// Pure functions of sizes: never of the number of threads, so that every number of threads gives
// the same bits.
CpuSpmmConfig choose_cpu_spmm(DType dtype, int32_t block_shift, int32_t strips, int32_t num_units, int64_t columns);
CpuSddmmConfig choose_cpu_sddmm(DType dtype, int32_t block_shift, int32_t num_units, int64_t columns);

}  // namespace csb::plan
