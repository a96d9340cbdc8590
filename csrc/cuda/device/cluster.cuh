#pragma once

#include "cuda/device/mma.cuh"

// Thread-block clusters (sm_90): neighbours read each other's shared memory. On older chips nothing is
// ever launched as a cluster, and these do nothing.

namespace csb::cuda {

// Every thread of the cluster arrives; what any of them wrote to shared memory is then seen by all.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What stands in the shared memory of thread block `rank` of the cluster where `local` stands in this one's.
__device__ __forceinline__ float read_neighbour(const float* local, int32_t rank) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %1, %2;\nld.shared::cluster.f32 %0, [at];\n}"
               : "=f"(value)
               : "r"(shared_address(local)), "r"(rank)
               : "memory");
#endif
  return value;
}

__device__ __forceinline__ double read_neighbour(const double* local, int32_t rank) {
  double value = 0.0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %1, %2;\nld.shared::cluster.f64 %0, [at];\n}"
               : "=d"(value)
               : "r"(shared_address(local)), "r"(rank)
               : "memory");
#endif
  return value;
}

__device__ __forceinline__ float4 read_neighbour(const float4* local, int32_t rank) {
  float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at];\n}"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(shared_address(local)), "r"(rank)
      : "memory");
#endif
  return value;
}

}  // namespace csb::cuda
