#include "cpu/kernel_prelude.h"

#define CSB_CPU_ISA isa_default
#define CSB_VECTOR_BYTES 16

#include "cpu/kernel_table.h"

namespace csb::cpu {
const Kernels kKernelsDefault = {"default", isa_default::spmm, isa_default::join, isa_default::sddmm,
                                 isa_default::sddmm_join};
}  // namespace csb::cpu
