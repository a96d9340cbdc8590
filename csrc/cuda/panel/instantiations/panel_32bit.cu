#include "cuda/panel/panel_launch.cuh"

namespace csb::cuda {

template cudaError_t launch_unpack_panel<uint32_t>(const PanelProblem&, cudaStream_t);
template cudaError_t launch_sample_panel<uint32_t>(const PanelProblem&, cudaStream_t);
template cudaError_t launch_unpack_bitmap_panel<uint32_t>(const PanelProblem&, cudaStream_t);
template cudaError_t launch_sample_bitmap_panel<uint32_t>(const PanelProblem&, cudaStream_t);

}  // namespace csb::cuda
