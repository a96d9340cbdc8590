#include "plan/units.h"

#include <algorithm>

#include "csb/integer.h"

namespace csb::plan {
namespace {

// A unit should outweigh the cost of starting it and of joining a strip that it shares. 528 units are
// one wave of four thread blocks on each of 132 multiprocessors.
constexpr int64_t kMinUnitNonzeros = 512;
constexpr int64_t kMinUnitBlocks = 4;
constexpr int64_t kMostUnits = 528;
constexpr int32_t kFewUnits = 16;  // below this, fewer units would cost more than uneven ones
constexpr double kWantedBalance = 1.1;
constexpr double kEvenStrips = 1.25;  // heaviest strip over the mean strip

struct Walk {
  std::vector<int64_t> nonzeros;  // prefix sums over the positions
  std::vector<int64_t> weight;    // the same, with a small cost for every block
  int64_t largest_block = 0;
};

// Walking an empty block costs a pointer, and an empty strip still has to be written, so a block
// weighs a sixteenth of the mean block even without entries.
Walk make_walk(const int32_t* blk_ptr, const uint8_t* blk_pad, int32_t mb, int32_t kb, bool column_major) {
  const int64_t blocks = int64_t{mb} * kb;
  Walk walk;
  walk.nonzeros.resize(blocks + 1, 0);
  walk.weight.resize(blocks + 1, 0);
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += blk_ptr[b + 1] - blk_ptr[b] - blk_pad[b];
  const int64_t mean = blocks > 0 ? max_of<int64_t>(1, total / blocks) : 1;
  for (int64_t p = 0; p < blocks; ++p) {
    const int64_t b = column_major ? (p % mb) * kb + p / mb : p;
    const int64_t nonzeros = blk_ptr[b + 1] - blk_ptr[b] - blk_pad[b];
    walk.nonzeros[p + 1] = walk.nonzeros[p] + nonzeros;
    walk.weight[p + 1] = walk.weight[p] + 16 * nonzeros + mean;
    walk.largest_block = max_of(walk.largest_block, nonzeros);
  }
  return walk;
}

// Fills units greedily up to `capacity`; true when num_units of them hold everything. Then `begin`
// has num_units + 1 entries, the last units possibly empty.
bool fill(const std::vector<int64_t>& weight, int64_t capacity, int32_t num_units, std::vector<int32_t>& begin) {
  const int32_t blocks = static_cast<int32_t>(weight.size()) - 1;
  begin.assign(1, 0);
  int32_t at = 0;
  for (int32_t u = 0; u < num_units; ++u) {
    const auto end = std::upper_bound(weight.begin() + at, weight.end(), weight[at] + capacity);
    at = static_cast<int32_t>(end - weight.begin()) - 1;
    begin.push_back(at);
  }
  return at == blocks;
}

// The cut into num_units runs whose heaviest run is lightest (parametric search over its weight).
std::vector<int32_t> lightest_cut(const Walk& walk, int32_t num_units) {
  const int64_t total = walk.weight.back();
  int64_t low = max_of<int64_t>(1, total / num_units);
  int64_t high = max_of<int64_t>(1, total);
  std::vector<int32_t> begin;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (fill(walk.weight, middle, num_units, begin)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  fill(walk.weight, high, num_units, begin);
  return begin;
}

// Heaviest unit over the mean; 1 where the heaviest is no more than a single block.
double imbalance(const Walk& walk, const std::vector<int32_t>& begin, int32_t num_units) {
  const int64_t total = walk.nonzeros.back();
  int64_t heaviest = 0;
  for (int32_t u = 0; u < num_units; ++u) {
    heaviest = max_of(heaviest, walk.nonzeros[begin[u + 1]] - walk.nonzeros[begin[u]]);
  }
  if (heaviest <= walk.largest_block || total == 0) return 1.0;
  return static_cast<double>(heaviest) * num_units / static_cast<double>(total);
}

bool strips_are_even(const Walk& walk, int32_t strips, int32_t blocks) {
  int64_t heaviest = 0;
  for (int32_t s = 0; s < strips; ++s) {
    heaviest = max_of(heaviest, walk.nonzeros[(s + 1) * blocks] - walk.nonzeros[s * blocks]);
  }
  return static_cast<double>(heaviest) * strips <= kEvenStrips * static_cast<double>(walk.nonzeros.back());
}

}  // namespace

Units plan_units(const int32_t* blk_ptr, const uint8_t* blk_pad, int32_t mb, int32_t kb) {
  const Walk rows = make_walk(blk_ptr, blk_pad, mb, kb, false);
  const Walk columns = make_walk(blk_ptr, blk_pad, mb, kb, true);
  const int64_t total = rows.nonzeros.back();
  const int64_t blocks = int64_t{mb} * kb;
  const int64_t affordable = min_of(blocks / kMinUnitBlocks, total / kMinUnitNonzeros);
  const int32_t wanted = static_cast<int32_t>(max_of<int64_t>(1, min_of(kMostUnits, affordable)));
  const int32_t fewest = wanted < kFewUnits ? wanted : wanted / 8;

  const bool even = strips_are_even(rows, mb, kb) && strips_are_even(columns, kb, mb);

  Units best{0, {}, {}};
  double best_imbalance = 0;
  for (int32_t tried = wanted; tried >= fewest; tried -= max_of(1, tried / 24)) {
    const int32_t num_units = tried % 2 == (even ? 0 : 1) ? tried : max_of(1, tried - 1);
    Units cut{num_units, lightest_cut(rows, num_units), lightest_cut(columns, num_units)};
    const double worst =
        max_of(imbalance(rows, cut.row_major, num_units), imbalance(columns, cut.column_major, num_units));
    if (best.num_units == 0 || worst < best_imbalance) {
      best = std::move(cut);
      best_imbalance = worst;
    }
    if (best_imbalance <= kWantedBalance) break;
  }
  return best;
}

std::vector<int64_t> unit_nonzeros(const int32_t* blk_ptr, const uint8_t* blk_pad, int32_t mb, int32_t kb,
                                   const int32_t* begin, int32_t num_units, bool column_major) {
  const Walk walk = make_walk(blk_ptr, blk_pad, mb, kb, column_major);
  std::vector<int64_t> nonzeros(num_units);
  for (int32_t u = 0; u < num_units; ++u) {
    nonzeros[u] = walk.nonzeros[begin[u + 1]] - walk.nonzeros[begin[u]];
  }
  return nonzeros;
}

}  // namespace csb::plan
