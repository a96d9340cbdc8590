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
// Of regions, which find their entries faster.
constexpr int64_t kMinRegionColumns = 32;

// Every run of columns leaves a sum for each entry.
constexpr int64_t kMaxSplitBytes = 32 * kMebi;

// Entries that a region takes in one pass over the columns, in rows of whole entries.
constexpr int64_t kPassEntries = 3400;

// From this density on float32 samples all of A . B^T faster than it multiplies the entries alone.
constexpr double kMinPanelDensity = 0.16;

constexpr int64_t kMaxCluster = 8;
// Of larger patterns clusters leave multiprocessors idle at the end for longer than a join takes.
constexpr int64_t kMaxClusterBlocks = 32768;

constexpr int64_t kMaxNarrowRowsColumns = 512;
// Of a thread block in a cluster of rows, where strips are even; half as many where they are not.
constexpr int32_t kMaxClusterBlocksEach = 4;

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

// Two strips share X in a tile of 256 columns, where the chip is full of them. Where even tiles of 64 leave it idle and
// strips are short the thread blocks of a cluster share one: that takes less than a second kernel for the join.
CudaSpmmConfig choose_rows(int32_t strips, int32_t num_units, int64_t columns, const Chip& chip,
                           int32_t blocks_per_strip) {
  const int32_t multiprocessors = chip.multiprocessors;
  if (chip.shared_bytes >= kWideRowsSharedBytes &&
      ceil_div(strips, 2) * ceil_div<int64_t>(columns, 256) >= multiprocessors && columns > kMaxNarrowRowsColumns) {
    return {CudaKernel::kRows, 256, false, 1,
            "rows: rows of Y stay in registers while other warps sort their entries; pairs of strips fill the chip"};
  }
  const int64_t whole_strips = strips * ceil_div<int64_t>(columns, 64);
  const bool whole = 2 * whole_strips >= 3 * multiprocessors;
  int32_t cluster = 1;
  while (cluster < kMaxCluster && 2 * cluster <= blocks_per_strip &&
         2 * cluster * whole_strips <= 2 * multiprocessors) {
    cluster *= 2;
  }
  const int32_t longest = num_units % 2 == 0 ? kMaxClusterBlocksEach : kMaxClusterBlocksEach / 2;
  if (chip.hopper && !whole && cluster > 1 && blocks_per_strip <= longest * cluster) {
    return {CudaKernel::kRows, 64, false, cluster,
            "rows: rows of Y stay in registers while other warps sort their entries; a cluster shares a strip"};
  }
  const bool fits = (int64_t{num_units} + strips) * columns * 64 * 4 <= kMaxPartialBytes;
  if (whole || num_units <= 1 || !fits) {
    return {CudaKernel::kRows, 64, false, 1,
            "rows: rows of Y stay in registers while other warps sort their entries; a thread block walks a strip"};
  }
  return {CudaKernel::kRows, 64, true, 1,
          "rows: rows of Y stay in registers while other warps sort their entries; work units balanced by nonzeros"};
}

struct FewColumnsReasons {
  const char* cluster;
  const char* units;
  const char* whole;
};

constexpr FewColumnsReasons few_columns_reasons(CudaKernel kernel) {
  if (kernel == CudaKernel::kSpmv) {
    return {"spmv: every lane has sums of its own; the strips are even, a cluster shares one",
            "spmv: every lane has sums of its own; work units balanced by nonzeros",
            "spmv: every lane has sums of its own; one work unit, nothing to split"};
  }
  if (kernel == CudaKernel::kBitmap) {
    return {nullptr,
            "bitmap: a warp expands a block alone into the tensor cores' registers; work units balanced by nonzeros",
            "bitmap: a warp expands a block alone into the tensor cores' registers; one work unit, nothing to split"};
  }
  return {"narrow: a warp expands a block alone and multiplies it; the strips are even, a cluster shares one",
          "narrow: a warp expands a block alone and multiplies it; work units balanced by nonzeros",
          "narrow: a warp expands a block alone and multiplies it; one work unit, nothing to split"};
}

// With few columns a call takes microseconds, and a second kernel that joins shared strips is a good part of
// them. Where strips are even the thread blocks of a cluster share one and join it themselves; a pattern
// of very many blocks is better cut into units, whose borders need not be those of strips. A bitmap's blocks
// take so long that a cluster saves nothing.
CudaSpmmConfig choose_few_columns(CudaKernel kernel, DType dtype, int32_t strips, int32_t blocks_per_strip,
                                  int32_t num_units, int32_t tile_n, const Chip& chip) {
  const bool spmv = kernel == CudaKernel::kSpmv;
  const bool small_sums = spmv && is_16_bit(dtype);
  const int64_t thread_blocks = chip.multiprocessors * (small_sums ? 4 : 3);
  int64_t cluster = min_of<int64_t>(kMaxCluster, thread_blocks / max_of(1, strips));
  if (!small_sums) cluster = cluster / 2 * 2;
  const bool small = int64_t{strips} * blocks_per_strip <= kMaxClusterBlocks;
  const bool quick = kernel != CudaKernel::kBitmap && (spmv || is_16_bit(dtype));  // so that what a join costs is seen
  const FewColumnsReasons reasons = few_columns_reasons(kernel);
  if (chip.hopper && quick && small && num_units % 2 == 0 && cluster >= 2) {
    return {kernel, tile_n, false, static_cast<int32_t>(cluster), reasons.cluster};
  }
  if (num_units > 1) return {kernel, tile_n, true, 1, reasons.units};
  return {kernel, tile_n, false, 1, reasons.whole};
}

int64_t most_splits(DType dtype, int64_t stored) {
  return kMaxSplitBytes / (max_of<int64_t>(stored, 1) * (dtype == DType::kFloat64 ? 8 : 4));
}

// Where regions leave multiprocessors idle several thread blocks share one: first its entries, as many as take turns
// anyway, then its columns.
CudaSddmmConfig choose_regions(int64_t columns, int32_t multiprocessors, const PanelOffer& sizes) {
  const int64_t regions = max_of<int64_t>(
      1, ceil_div<int64_t>(sizes.features, kRegionFeatures) * ceil_div<int64_t>(sizes.depth, kRegionFeatures));
  const int64_t passes = max_of<int64_t>(1, ceil_div(ceil_div(sizes.stored, regions), kPassEntries));
  const int64_t shares = min_of(passes, max_of<int64_t>(1, multiprocessors / regions));
  const int64_t wanted = min_of(multiprocessors / (regions * shares), columns / kMinRegionColumns);
  const int64_t splits = max_of<int64_t>(1, min_of(wanted, most_splits(DType::kFloat32, sizes.stored)));
  return {CudaKernel::kRegion, 16, static_cast<int32_t>(splits), static_cast<int32_t>(shares),
          splits > 1 ? "region: four lanes an entry; columns cut into runs, as few regions leave the chip idle"
                     : "region: four lanes an entry; the regions fill the chip or the columns are few"};
}

}  // namespace

CudaSpmmConfig choose_cuda_spmm(DType dtype, int32_t block_shift, int32_t strips, int32_t num_units, int64_t columns,
                                const Chip& chip, const Operands& operands) {
  const PanelChoice panel = choose_spmm_panel(dtype, block_shift, columns, chip.multiprocessors, operands.panel);
  if (panel.features > 0) return {CudaKernel::kPanel, panel.features, false, 1, panel.reason};
  if (operands.pieces && block_shift == 6) {
    const int32_t blocks = operands.blocks_per_strip;
    if (operands.bitmap && columns <= bitmap_columns(dtype)) {
      return choose_few_columns(CudaKernel::kBitmap, dtype, strips, blocks, num_units, columns <= 8 ? 8 : 16, chip);
    }
    if (columns == 1) return choose_few_columns(CudaKernel::kSpmv, dtype, strips, blocks, num_units, 1, chip);
    if (columns <= narrow_columns(dtype)) {
      return choose_few_columns(CudaKernel::kNarrow, dtype, strips, blocks, num_units, 8, chip);
    }
  }
  if (operands.pieces && chip.hopper && tensor_cores_fit(dtype, block_shift) && columns > narrow_columns(dtype)) {
    return {CudaKernel::kWide, 64, false, 1,
            "wide: warps that expand blocks of four strips feed warps that multiply; a cluster joins its sums"};
  }
  if (dtype == DType::kFloat32 && block_shift == 6 && columns > narrow_columns(dtype) && !operands.bitmap &&
      chip.shared_bytes >= kRowsSharedBytes) {
    return choose_rows(strips, num_units, columns, chip, operands.blocks_per_strip);
  }
  const CudaKernel kernel = tensor_cores_fit(dtype, block_shift) ? CudaKernel::kTile : CudaKernel::kGather;
  const int32_t tile_n = spmm_tile_n(kernel, dtype, columns);
  const SplitChoice choice =
      choose_split(kernel, dtype, block_shift, strips, num_units, columns, tile_n, chip.multiprocessors);
  return {kernel, tile_n, choice.split, 1, choice.reason};
}

CudaSddmmConfig choose_cuda_sddmm(DType dtype, int32_t block_shift, int32_t num_units, int64_t columns,
                                  const Chip& chip, const SampledOperands& operands) {
  const int32_t multiprocessors = chip.multiprocessors;
  const PanelOffer& sizes = operands.panel;
  const bool region =
      operands.region && dtype == DType::kFloat32 && block_shift == 6 && chip.shared_bytes >= kRegionSharedBytes;
  const double elements = static_cast<double>(sizes.features) * static_cast<double>(sizes.depth);
  if (!region || static_cast<double>(sizes.stored) >= kMinPanelDensity * elements) {
    const PanelChoice panel = choose_sddmm_panel(dtype, block_shift, columns, multiprocessors, sizes);
    if (panel.features > 0) return {CudaKernel::kPanel, panel.features, 1, 1, panel.reason};
  }
  if (region) return choose_regions(columns, multiprocessors, sizes);
  const bool tile = tensor_cores_fit(dtype, block_shift);
  const CudaKernel kernel = tile ? CudaKernel::kTile : CudaKernel::kGather;
  const int32_t tile_n = tile ? 64 : dtype == DType::kFloat64 ? 16 : 32;

  const int64_t wanted = num_units < multiprocessors ? kFullChip * multiprocessors / max_of<int32_t>(1, num_units) : 1;
  const int64_t splits = min_of(min_of(wanted, columns / kMinSplitColumns), most_splits(dtype, sizes.stored));
  if (splits > 1) {
    return {kernel, tile_n, static_cast<int32_t>(splits), 1,
            tile
                ? "tile: dense products sampled at the entries; columns cut into runs, as few units leave the chip idle"
                : "gather: one product per entry; columns cut into runs, as few units leave the chip idle"};
  }
  return {kernel, tile_n, 1, 1,
          tile ? "tile: dense products sampled at the entries; the units fill the chip or the columns are few"
               : "gather: one product per entry; the units fill the chip or the columns are few"};
}

}  // namespace csb::plan
