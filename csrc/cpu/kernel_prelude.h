#pragma once

// Everything that the kernel headers (simd.h ... kernel_table.h) use from outside. It must be included before a wider
// target is switched on: an inline function of these headers that was compiled for AVX-512 could otherwise be the copy
// which the linker keeps for the whole program.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/capability.h"
#include "cpu/scratch.h"
#include "cpu/tasks.h"
#include "csb/problem.h"
#include "plan/cpu_config.h"

#define CSB_INLINE inline __attribute__((always_inline))

#if defined(__clang__)
#define CSB_UNROLL _Pragma("unroll")
#else
#define CSB_UNROLL _Pragma("GCC unroll 16")
#endif
