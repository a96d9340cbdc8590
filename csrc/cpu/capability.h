#pragma once

#include "csb/problem.h"
#include "plan/cpu_config.h"

namespace csb::cpu {

// "default", "avx2" or "avx512": the instruction set the kernels run with, the widest that the processor has and the
// environment variable ATEN_CPU_CAPABILITY (read once) allows.
const char* capability();

// The kernels compiled for one instruction set; every function works on a range of tasks.
struct Kernels {
  const char* name;
  void (*spmm)(const SpmmProblem&, const plan::CpuSpmmConfig&, int64_t begin, int64_t end);
  void (*join)(const SpmmProblem&, const plan::CpuSpmmConfig&, int64_t begin, int64_t end);
  void (*sddmm)(const SddmmProblem&, const plan::CpuSddmmConfig&, int64_t begin, int64_t end);
  void (*sddmm_join)(const SddmmProblem&, const plan::CpuSddmmConfig&, int64_t begin, int64_t end);
};

const Kernels& kernels();

extern const Kernels kKernelsDefault;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace csb::cpu
