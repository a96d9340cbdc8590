#pragma once

#include <cstdint>

#include "cuda/device/mma.cuh"

// Barriers in shared memory on which threads arrive without waiting, so that warps of one thread block can run ahead of
// each other. Phases are told apart by their parity.

namespace csb::cuda {

using MBarrier = uint64_t;  // named by its shared-memory address below

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// Arrives once this thread's cp.async copies so far have landed; counted in mbarrier_init().
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
#else
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
#endif
  return done != 0;
}

// Returns once the phase of this parity is over. The phase before a barrier's first counts as parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_test(barrier, parity)) {
  }
}

// Makes this thread's stores to shared memory visible to the tensor cores' own reads of it.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// A position in a ring of kStages slots and the parity of the barriers there.
template <int kStages>
struct RingPosition {
  int32_t slot = 0;
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
