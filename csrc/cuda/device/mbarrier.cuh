#pragma once

#include <cstdint>

#include "cuda/device/mma.cuh"

// Hand-over between the warps of a thread block (sm_90).

namespace csb::cuda {

using MBarrier = uint64_t;  // named by its shared-memory address below

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Returns once the phase of this parity is over. The phase before a barrier's first counts as parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Makes this thread's stores to shared memory visible to the tensor cores' own reads of it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// A position in a ring of kStages slots and the parity of the barriers there.
template <int kStages>
struct RingPosition {
  int32_t slot;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int32_t by) {  // by <= kStages
    slot += by;
    if (slot >= kStages) {
      slot -= kStages;
      parity ^= 1;
    }
  }
};

}  // namespace csb::cuda
