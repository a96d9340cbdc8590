#if defined(__x86_64__)

#include "cpu/kernel_prelude.h"

#define CSB_CPU_ISA isa_avx512
#define CSB_VECTOR_BYTES 64

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // set off by GCC 12's own intrinsics
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#include "cpu/kernel_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace csb::cpu {
const Kernels kKernelsAvx512 = {"avx512", isa_avx512::spmm, isa_avx512::join, isa_avx512::sddmm,
                                isa_avx512::sddmm_join};
}  // namespace csb::cpu

#endif  // defined(__x86_64__)
