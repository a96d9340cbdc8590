#pragma once

#include "csb/problem.h"
#include "plan/panel.h"

namespace csb::plan {

enum class CudaKernel : int32_t {
  kGather,  // multiplies only the stored entries, on CUDA cores; every dtype and block size
  kTile,    // expands a block into a shared-memory tile for the tensor cores; 16-bit, block_size 64
  kSpmv,    // one column: sums of its own for every lane; blocks of 64
  kNarrow,  // 2 columns to narrow_columns(): a warp expands a block alone, in 16 bit for the tensor cores; float32 and
            // 16-bit, blocks of 64
  kBitmap,  // up to bitmap_columns(): reads a bitmap where the others read codes; a warp expands a block alone,
            // straight into the tensor cores' registers; 16-bit, blocks of 64
  kWide,    // 17 columns and more: warps that expand blocks of four strips feed warps that multiply; 16-bit,
            // blocks of 64, Hopper
  kRows,    // more columns than kNarrow: rows of Y in registers, their entries sorted by other warps; float32,
            // blocks of 64
  kRegion,  // SDDMM in float32, blocks of 64: the entries of 256 x 256 features of W, four lanes an entry
  kPanel,   // expands panels of W in device memory for the library's dense product; see plan/panel.h
};

struct CudaSpmmConfig {
  CudaKernel kernel;
  int32_t tile_n;     // columns a thread block computes; of kPanel the output features in a panel
  bool split_strips;  // a thread block walks one unit (strips may be shared and joined), else one whole strip
  int32_t cluster;    // thread blocks that walk a whole strip together, 1 where strips are split
  const char* reason;
};

struct CudaSddmmConfig {
  CudaKernel kernel;
  int32_t tile_n;  // of kPanel the rows of W in a panel
  int32_t column_splits;
  int32_t shares;  // thread blocks that share the entries of a region, 1 for other kernels
  const char* reason;
};

constexpr int64_t narrow_columns(DType dtype) {
  return dtype == DType::kFloat64 ? 0 : dtype == DType::kFloat32 ? 16 : 8;
}

constexpr int64_t bitmap_columns(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 16 : 0; }

// Shared memory of a thread block, in bytes, that a chip must have for a kernel. Of the others 99 KiB are enough.
constexpr int32_t kRowsSharedBytes = 104 * 1024;
constexpr int32_t kWideRowsSharedBytes = 184 * 1024;
constexpr int32_t kRegionSharedBytes = 162 * 1024;

constexpr int32_t kRegionFeatures = 256;  // of W on either side of a region

struct Chip {
  int32_t multiprocessors;
  bool hopper;           // compute capability 9.0: clusters of thread blocks
  int32_t shared_bytes;  // that a thread block can have
};

// What the tensors of a product allow, beyond their sizes.
struct Operands {
  int32_t blocks_per_strip = 0;
  bool pieces = false;  // values, and in 16 bit for up to narrow_columns() x along its features, can be read 16 bytes
                        // at a time
  PanelOffer panel;
  bool bitmap = false;  // W has a bitmap; kernels other than kBitmap and kPanel are given codes made of it, whose
                        // entries are not in row_major order
};

struct SampledOperands {
  bool region = false;  // the kernel of regions can read the tensors
  PanelOffer panel;     // its sizes count, also where panels don't fit
};

// Pure functions of sizes and of the chip.
CudaSpmmConfig choose_cuda_spmm(DType dtype, int32_t block_shift, int32_t strips, int32_t num_units, int64_t columns,
                                const Chip& chip, const Operands& operands);
CudaSddmmConfig choose_cuda_sddmm(DType dtype, int32_t block_shift, int32_t num_units, int64_t columns,
                                  const Chip& chip, const SampledOperands& operands);

}  // namespace csb::plan
