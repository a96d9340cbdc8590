#include "plan/cpu_config.h"

namespace csb::plan {
namespace {

// Tasks that keep the cores of a large machine busy.
constexpr int64_t kEnoughTasks = 16;

// Up to this many column tiles the shares of cut strips are a small part of the work; beyond it the tiles alone
// balance the threads, whatever the strips hold.
constexpr int64_t kFewTiles = 4;

// Columns of one SDDMM task below which a further cut costs more than it balances.
constexpr int64_t kMinSplitColumns = 256;

// Tile widths are 1, 4, 8, ... 64: the widest whose row still fits registers together with a second operand.
int32_t tile_for(DType dtype, int64_t columns) {
  if (columns <= 1) return 1;
  const int32_t widest = dtype == DType::kFloat64 ? 32 : 64;
  int32_t tile_n = 4;
  while (tile_n < widest && tile_n < columns) tile_n *= 2;
  return tile_n;
}

}  // namespace

CpuSpmmConfig choose_cpu_spmm(DType dtype, int32_t /*block_shift*/, int32_t strips, int32_t num_units,
                              int64_t columns) {
  const int32_t tile_n = tile_for(dtype, columns);
  const int64_t tiles = ceil_div<int64_t>(columns, tile_n);
  if (num_units <= 1) return {tile_n, false, "one work unit: whole strips"};
  // An even number of units says that every strip holds about as much as the next (docs/format.md).
  if (num_units % 2 == 0 && tiles * strips >= kEnoughTasks)
    return {tile_n, false, "even strips: whole ones balance the nonzeros, nothing to join"};
  if (tiles <= kFewTiles)
    return {tile_n, true, "few columns: work units balance the nonzeros, shared strips are joined"};
  if (tiles * strips < kEnoughTasks) return {tile_n, true, "few strips: work units make more tasks"};
  return {tile_n, false, "many column tiles: whole strips, nothing to join"};
}

CpuSddmmConfig choose_cpu_sddmm(DType dtype, int32_t /*block_shift*/, int32_t num_units, int64_t columns) {
  const int32_t tile_n = tile_for(dtype, columns);
  const int64_t wanted = ceil_div<int64_t>(kEnoughTasks, max_of(num_units, 1));
  const int64_t possible = max_of<int64_t>(columns / kMinSplitColumns, 1);
  const int32_t splits = static_cast<int32_t>(min_of(wanted, possible));
  if (splits == 1) return {tile_n, 1, "work units alone make the tasks"};
  return {tile_n, splits, "few work units: the columns are cut too and joined in order"};
}

}  // namespace csb::plan
