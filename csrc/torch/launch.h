#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "plan/cuda_config.h"
#include "torch/checks.h"

// Defined by a CUDA build of torch only; weak, so that this library also loads beside a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace csb::border {

inline void check_cuda(cudaError_t status, const char* what) {
  CSB_CHECK(status == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(status));
}

// Makes the tensors' device current and finds its stream for the time of one call.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const int32_t device = tensor.get_device_index();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check_cuda(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device), "device attributes");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device), "device attributes");
    check_cuda(cudaDeviceGetAttribute(&shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "device attributes");
    CSB_CHECK(major_ >= 8, "torch_csb needs a GPU of compute capability 8.0 or later, cuda:", device, " has ", major_,
              ".x; move the model to the CPU or densify_ it");
  }

  cudaStream_t stream() const { return stream_; }
  plan::Chip chip() const { return {multiprocessors_, major_ == 9, shared_bytes_}; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0;
  int major_ = 0;
  int shared_bytes_ = 0;
};

}  // namespace csb::border
