#pragma once

#include <cstdint>
#include <vector>

namespace csb::plan {

// The work units of one pattern. Unit u walks the block positions [begin[u], begin[u + 1]):
// row_major counts blocks as they are stored (block (I, J) at I * kb + J) and serves W . X,
// column_major counts them down the block columns (at J * mb + I) and serves W^T . X.
// Both hold num_units + 1 entries, so that one [2, num_units + 1] tensor keeps them.
struct Units {
  int32_t num_units;
  std::vector<int32_t> row_major;
  std::vector<int32_t> column_major;
};

// Cuts both walks into the same number of units of nearly equal nonzeros: at most 1.1 times the
// mean (or one block, where a single block holds more) in either walk whenever some number of
// units between an eighth of the wanted number and all of it allows that, else the most even cut.
// A small pattern that wants fewer than 16 units gets them, cut as evenly as its blocks allow.
//
// The number of units is all that a launch knows of the pattern without reading device memory. Even, it
// says that no strip, in either direction, holds over 1.25 times the mean strip's nonzeros, so that
// whole strips are balanced work as well; odd (or one unit), that some strip does.
// blk_ptr: [mb * kb + 1], blk_pad: [mb * kb].
Units plan_units(const int32_t* blk_ptr, const uint8_t* blk_pad, int32_t mb, int32_t kb);

// Nonzeros of each unit of a walk, for checks and pictures.
std::vector<int64_t> unit_nonzeros(const int32_t* blk_ptr, const uint8_t* blk_pad, int32_t mb, int32_t kb,
                                   const int32_t* begin, int32_t num_units, bool column_major);

}  // namespace csb::plan
