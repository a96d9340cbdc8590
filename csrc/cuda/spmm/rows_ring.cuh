#pragma once

#include "cuda/device/mma.cuh"

namespace csb::cuda {

// A barrier in shared memory on which threads arrive without waiting, so that warps of one thread block can run
// ahead of each other. Phases are told apart by their parity.
__device__ __forceinline__ void ring_init(uint64_t* barrier, int32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void ring_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives once this thread's cp.async copies so far have landed; counted in ring_init().
__device__ __forceinline__ void ring_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ bool ring_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
#else
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
#endif
  return done != 0;
}

// Returns once the phase of this parity is over.
__device__ __forceinline__ void ring_wait(uint64_t* barrier, uint32_t parity) {
  while (!ring_test(barrier, parity)) {
  }
}

// One element, 4 or 8 bytes, from global to shared memory without a register in between. No "memory" clobber: it would
// put every address that is read from memory behind the copy before it.
template <typename T>
__device__ __forceinline__ void copy_element_async(T* to, const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "cp.async moves 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(sizeof(T)));
}

template <int kStages>
struct RingCursor {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

}  // namespace csb::cuda
