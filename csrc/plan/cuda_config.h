#pragma once

#include "csb/problem.h"
#include "plan/panel.h"

namespace csb::plan {

enum class CudaKernel : int32_t {
  kGather,  // multiplies only the stored entries, on CUDA cores; every dtype and block size
  kTile,    // expands a block into a shared-memory tile for the tensor cores; 16-bit, block_size 64
  kPanel,   // expands panels of W in device memory for the library's dense product; see plan/panel.h
};

struct CudaSpmmConfig {
  CudaKernel kernel;
  int32_t tile_n;     // columns a thread block computes; of kPanel the output features in a panel
  bool split_strips;  // a thread block walks one unit (strips may be shared and joined), else one whole strip
  int32_t cluster;    // thread blocks that walk a whole strip together
  const char* reason;
};

struct CudaSddmmConfig {
  CudaKernel kernel;
  int32_t tile_n;  // of kPanel the rows of W in a panel
  int32_t column_splits;
  const char* reason;
};

// Pure functions of sizes and of the chip's number of multiprocessors.
CudaSpmmConfig choose_cuda_spmm(DType dtype, int32_t block_shift, int32_t strips, int32_t num_units, int64_t columns,
                                int32_t multiprocessors, const PanelOffer& offer = {});
CudaSddmmConfig choose_cuda_sddmm(DType dtype, int32_t block_shift, int32_t num_units, int64_t columns,
                                  int32_t multiprocessors, const PanelOffer& offer = {});

}  // namespace csb::plan
