#pragma once

#include "cpu/sddmm_worker.h"
#include "cpu/spmm_worker.h"

// The entry points of one instruction set, from a run-time to a compile-time element type. Kernel header: see
// kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

#define CSB_FOR_DTYPE(dtype, function, ...)   \
  switch (dtype) {                            \
    case DType::kFloat64:                     \
      return function<double>(__VA_ARGS__);   \
    case DType::kFloat32:                     \
      return function<float>(__VA_ARGS__);    \
    case DType::kBFloat16:                    \
      return function<BFloat16>(__VA_ARGS__); \
    case DType::kFloat16:                     \
      return function<Float16>(__VA_ARGS__);  \
  }                                           \
  __builtin_trap()

inline void spmm(const SpmmProblem& p, const plan::CpuSpmmConfig& config, int64_t begin, int64_t end) {
  CSB_FOR_DTYPE(p.dtype, spmm_range, p, config, begin, end);
}

inline void join(const SpmmProblem& p, const plan::CpuSpmmConfig& config, int64_t begin, int64_t end) {
  CSB_FOR_DTYPE(p.dtype, join_range, p, config, begin, end);
}

inline void sddmm(const SddmmProblem& p, const plan::CpuSddmmConfig& config, int64_t begin, int64_t end) {
  CSB_FOR_DTYPE(p.dtype, sddmm_range, p, config, begin, end);
}

inline void sddmm_join(const SddmmProblem& p, const plan::CpuSddmmConfig& config, int64_t begin, int64_t end) {
  CSB_FOR_DTYPE(p.dtype, sddmm_join_range, p, config, begin, end);
}

#undef CSB_FOR_DTYPE

}  // namespace csb::cpu::CSB_CPU_ISA
