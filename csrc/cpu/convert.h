#pragma once

#include "csb/problem.h"

namespace csb::cpu {

// Between a dense matrix and CSB; a task is one block row. count fills p.counts, pack p.codes and p.values (row_major
// entry order, padding zero), pack_bitmap p.bitmap and p.values (quarter_major, padding zero), unpack all of p.dense,
// of codes, and to_codes p.codes of a bitmap. Where a bitmap contradicts blk_ptr, to_codes stays inside the block's
// entries.
int64_t convert_tasks(const ConvertProblem& p);
void count(const ConvertProblem& p, int64_t begin, int64_t end);
void pack(const ConvertProblem& p, int64_t begin, int64_t end);
void pack_bitmap(const ConvertProblem& p, int64_t begin, int64_t end);
void unpack(const ConvertProblem& p, int64_t begin, int64_t end);
void to_codes(const ConvertProblem& p, int64_t begin, int64_t end);

}  // namespace csb::cpu
