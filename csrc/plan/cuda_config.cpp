#include "plan/cuda_config.h"

namespace csb::plan {
namespace {

constexpr int64_t kMebi = int64_t{1} << 20;

// Thread blocks per multiprocessor that count as a full chip, for every kernel here.
constexpr int64_t kFullChip = 4;

// Shared strips cost a buffer and a second pass over it; past this size whole strips are cheaper.
constexpr int64_t kMaxPartialBytes = 64 * kMebi;

// A run of columns shorter than this spends its time on codes rather than on products.
constexpr int64_t kMinSplitColumns = 256;
constexpr int64_t kMaxColumnSplits = 16;

constexpr int64_t kMaxCluster = 8;
// Of larger patterns clusters leave multiprocessors idle at the end for longer than a join takes.
constexpr int64_t kMaxClusterBlocks = 32768;

constexpr int64_t kMinRowsColumns = 33;
constexpr int64_t kMaxNarrowRowsColumns = 512;

bool is_16_bit(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

bool tensor_cores_fit(DType dtype, int32_t block_shift) { return is_16_bit(dtype) && block_shift == 6; }

template <int32_t kCount>
int32_t smallest_covering(const int32_t (&widths)[kCount], int64_t columns) {
  for (int32_t width : widths) {
    if (width >= columns) return width;
  }
  return widths[kCount - 1];
}

int32_t spmm_tile_n(CudaKernel kernel, DType dtype, int64_t columns) {
  constexpr int32_t kTileWidths[] = {8, 32, 64, 128};
  constexpr int32_t kGatherWidths[] = {1, 8, 32, 64, 128};
  constexpr int32_t kGatherDoubleWidths[] = {1, 8, 32, 64};
  if (kernel == CudaKernel::kTile) return smallest_covering(kTileWidths, columns);
  if (dtype == DType::kFloat64) return smallest_covering(kGatherDoubleWidths, columns);
  return smallest_covering(kGatherWidths, columns);
}

struct SplitChoice {
  bool split;
  const char* reason;
};

SplitChoice choose_split(CudaKernel kernel, DType dtype, int32_t block_shift, int32_t strips, int32_t num_units,
                         int64_t columns, int32_t tile_n, int32_t multiprocessors) {
  const bool tile = kernel == CudaKernel::kTile;
  if (num_units <= 1) {
    return {false, tile ? "tile: 16-bit values in blocks of 64 fill tensor core tiles; one work unit, nothing to split"
                        : "gather: products of the stored entries only; one work unit, nothing to split"};
  }
  const int64_t sub_strips = tile || block_shift <= 6 ? 1 : int64_t{1} << (block_shift - 6);
  const int64_t column_tiles = ceil_div<int64_t>(columns, tile_n);
  if (strips * sub_strips * column_tiles >= kFullChip * multiprocessors) {
    return {false, tile ? "tile: whole strips times column tiles fill the chip"
                        : "gather: whole strips times column tiles fill the chip"};
  }
  const int64_t acc_bytes = dtype == DType::kFloat64 ? 8 : 4;
  const int64_t slot_bytes = (columns << block_shift) * acc_bytes;
  if ((int64_t{num_units} + strips) * slot_bytes > kMaxPartialBytes) {
    return {false, tile ? "tile: sharing strips would need more than 64 MiB of partial sums"
                        : "gather: sharing strips would need more than 64 MiB of partial sums"};
  }
  return {true, tile ? "tile: work units balanced by nonzeros, because whole strips leave the chip idle"
                     : "gather: work units balanced by nonzeros, because whole strips leave the chip idle"};
}

// Two strips share X in a tile of 256 columns, where the chip is full of them.
CudaSpmmConfig choose_rows(int32_t strips, int32_t num_units, int64_t columns, int32_t multiprocessors) {
  if (ceil_div(strips, 2) * ceil_div<int64_t>(columns, 256) >= multiprocessors && columns > kMaxNarrowRowsColumns) {
    return {CudaKernel::kRows, 256, false, 1,
            "rows: rows of Y stay in registers while other warps sort their entries; pairs of strips fill the chip"};
  }
  const bool whole = 2 * strips * ceil_div<int64_t>(columns, 64) >= 3 * multiprocessors;
  const bool fits = (int64_t{num_units} + strips) * columns * 64 * 4 <= kMaxPartialBytes;
  if (whole || num_units <= 1 || !fits) {
    return {CudaKernel::kRows, 64, false, 1,
            "rows: rows of Y stay in registers while other warps sort their entries; a thread block walks a strip"};
  }
  return {CudaKernel::kRows, 64, true, 1,
          "rows: rows of Y stay in registers while other warps sort their entries; work units balanced by nonzeros"};
}

// With few columns a call takes microseconds, and a second kernel that joins shared strips is a good part of
// them. Where strips are even the thread blocks of a cluster share one and join it themselves; a pattern
// of very many blocks is better cut into units, whose borders need not be those of strips.
CudaSpmmConfig choose_few_columns(CudaKernel kernel, DType dtype, int32_t strips, int32_t blocks_per_strip,
                                  int32_t num_units, int32_t tile_n, const Chip& chip) {
  const bool spmv = kernel == CudaKernel::kSpmv;
  const bool small_sums = spmv && is_16_bit(dtype);
  const int64_t thread_blocks = chip.multiprocessors * (small_sums ? 4 : 3);
  int64_t cluster = min_of<int64_t>(kMaxCluster, thread_blocks / max_of(1, strips));
  if (!small_sums) cluster = cluster / 2 * 2;
  const bool small = int64_t{strips} * blocks_per_strip <= kMaxClusterBlocks;
  if (chip.hopper && small && num_units % 2 == 0 && cluster >= 2) {
    return {
        kernel, tile_n, false, static_cast<int32_t>(cluster),
        spmv ? "spmv: every lane has sums of its own; the strips are even, a cluster shares one"
             : "narrow: a warp expands a block alone for the tensor cores; the strips are even, a cluster shares one"};
  }
  if (num_units > 1) {
    return {kernel, tile_n, true, 1,
            spmv ? "spmv: every lane has sums of its own; work units balanced by nonzeros"
                 : "narrow: a warp expands a block alone for the tensor cores; work units balanced by nonzeros"};
  }
  return {kernel, tile_n, false, 1,
          spmv ? "spmv: every lane has sums of its own; one work unit, nothing to split"
               : "narrow: a warp expands a block alone for the tensor cores; one work unit, nothing to split"};
}

}  // namespace

CudaSpmmConfig choose_cuda_spmm(DType dtype, int32_t block_shift, int32_t strips, int32_t num_units, int64_t columns,
                                const Chip& chip, const Operands& operands) {
  const PanelChoice panel = choose_spmm_panel(dtype, block_shift, columns, chip.multiprocessors, operands.panel);
  if (panel.features > 0) return {CudaKernel::kPanel, panel.features, false, 1, panel.reason};
  if (operands.pieces && block_shift == 6) {
    const int32_t blocks = operands.blocks_per_strip;
    if (columns == 1) return choose_few_columns(CudaKernel::kSpmv, dtype, strips, blocks, num_units, 1, chip);
    if (is_16_bit(dtype) && columns <= kNarrowColumns) {
      return choose_few_columns(CudaKernel::kNarrow, dtype, strips, blocks, num_units, columns <= 8 ? 8 : 16, chip);
    }
  }
  if (operands.pieces && chip.hopper && tensor_cores_fit(dtype, block_shift) && columns > kNarrowColumns) {
    return {CudaKernel::kWide, 64, false, 1,
            "wide: warps that expand blocks of four strips feed warps that multiply; a cluster joins its sums"};
  }
  if (dtype == DType::kFloat32 && block_shift == 6 && columns >= kMinRowsColumns) {
    return choose_rows(strips, num_units, columns, chip.multiprocessors);
  }
  const CudaKernel kernel = tensor_cores_fit(dtype, block_shift) ? CudaKernel::kTile : CudaKernel::kGather;
  const int32_t tile_n = spmm_tile_n(kernel, dtype, columns);
  const SplitChoice choice =
      choose_split(kernel, dtype, block_shift, strips, num_units, columns, tile_n, chip.multiprocessors);
  return {kernel, tile_n, choice.split, 1, choice.reason};
}

CudaSddmmConfig choose_cuda_sddmm(DType dtype, int32_t block_shift, int32_t num_units, int64_t columns,
                                  const Chip& chip, const PanelOffer& offer) {
  const int32_t multiprocessors = chip.multiprocessors;
  const PanelChoice panel = choose_sddmm_panel(dtype, block_shift, columns, multiprocessors, offer);
  if (panel.features > 0) return {CudaKernel::kPanel, panel.features, 1, panel.reason};
  const bool tile = tensor_cores_fit(dtype, block_shift);
  const CudaKernel kernel = tile ? CudaKernel::kTile : CudaKernel::kGather;
  const int32_t tile_n = tile ? 64 : dtype == DType::kFloat64 ? 16 : 32;

  // The planner gives a large pattern many units, so few units also mean a small buffer of partial sums.
  const int64_t wanted = num_units < multiprocessors ? kFullChip * multiprocessors / max_of<int32_t>(1, num_units) : 1;
  const int64_t splits = min_of(min_of(wanted, columns / kMinSplitColumns), kMaxColumnSplits);
  if (splits > 1) {
    return {kernel, tile_n, static_cast<int32_t>(splits),
            tile
                ? "tile: dense products sampled at the entries; columns cut into runs, as few units leave the chip idle"
                : "gather: one product per entry; columns cut into runs, as few units leave the chip idle"};
  }
  return {kernel, tile_n, 1,
          tile ? "tile: dense products sampled at the entries; the units fill the chip or the columns are few"
               : "gather: one product per entry; the units fill the chip or the columns are few"};
}

}  // namespace csb::plan
