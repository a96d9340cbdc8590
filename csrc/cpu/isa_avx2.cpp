#if defined(__x86_64__)

#include "cpu/kernel_prelude.h"

#define CSB_CPU_ISA isa_avx2
#define CSB_VECTOR_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "cpu/kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace csb::cpu {
const Kernels kKernelsAvx2 = {"avx2", isa_avx2::spmm, isa_avx2::join, isa_avx2::sddmm, isa_avx2::sddmm_join};
}  // namespace csb::cpu

#endif  // defined(__x86_64__)
