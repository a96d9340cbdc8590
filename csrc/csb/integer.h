#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CSB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CSB_HOST_DEVICE inline
#endif

namespace csb {

template <typename Int>
CSB_HOST_DEVICE constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

template <typename Int>
CSB_HOST_DEVICE constexpr Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

template <typename Int>
CSB_HOST_DEVICE constexpr Int min_of(Int a, Int b) {
  return a < b ? a : b;
}

template <typename Int>
CSB_HOST_DEVICE constexpr Int max_of(Int a, Int b) {
  return a > b ? a : b;
}

}  // namespace csb
