#include "cuda/device/launch.cuh"
#include "cuda/spmm/bitmap.h"
#include "cuda/spmm/gather.h"
#include "cuda/spmm/join.h"
#include "cuda/spmm/narrow.h"
#include "cuda/spmm/rows.h"
#include "cuda/spmm/spmm.h"
#include "cuda/spmm/spmv.h"
#include "cuda/spmm/tile.h"
#include "cuda/spmm/wide.h"

namespace csb::cuda {
namespace {

cudaError_t launch_kernel(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  switch (config.kernel) {
    case plan::CudaKernel::kGather:
      return dispatch_dtype(problem.dtype, [&](auto tag) {
        return launch_gather<typename decltype(tag)::type>(problem, config, stream);
      });
    case plan::CudaKernel::kTile:
      return launch_tile(problem, config, stream);
    case plan::CudaKernel::kSpmv:
      return dispatch_dtype(
          problem.dtype, [&](auto tag) { return launch_spmv<typename decltype(tag)::type>(problem, config, stream); });
    case plan::CudaKernel::kNarrow:
      return launch_narrow(problem, config, stream);
    case plan::CudaKernel::kBitmap:
      return launch_bitmap(problem, config, stream);
    case plan::CudaKernel::kRows:
      if (problem.dtype != DType::kFloat32) break;
      return launch_rows<float>(problem, config.tile_n == 256 ? RowsTile::k2x256 : RowsTile::k1x64, config.split_strips,
                                config.cluster, stream);
    case plan::CudaKernel::kWide:
      return launch_wide(problem, stream);
    case plan::CudaKernel::kPanel:
      break;  // a product of the library, which the border calls
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool in_pieces(const SpmmProblem& problem) {
  if (problem.w.bitmap != nullptr && problem.y.columns <= plan::bitmap_columns(problem.dtype)) {
    return bitmap_fits(problem);
  }
  if (problem.y.columns == 1) return spmv_fits(problem);
  return problem.y.columns <= plan::narrow_columns(problem.dtype) ? narrow_fits(problem) : wide_fits(problem);
}

cudaError_t spmm(const SpmmProblem& problem, const plan::CudaSpmmConfig& config, cudaStream_t stream) {
  plan::CudaSpmmConfig checked = config;
  // One unit shares no strip, and without blocks no unit would visit the strips at all.
  checked.split_strips = config.split_strips && problem.num_units > 1 && problem.w.num_blocks() > 0;
  if (problem.w.num_blocks() == 0) checked.cluster = 1;
  if (checked.split_strips && problem.partials == nullptr) return cudaErrorInvalidValue;
  const cudaError_t error = launch_kernel(problem, checked, stream);
  if (error != cudaSuccess || !checked.split_strips) return error;
  return launch_join(problem, stream);
}

}  // namespace csb::cuda
