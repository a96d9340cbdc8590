#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "csb/problem.h"

namespace csb::cuda {

// Acc is the type in which a dtype is multiplied and added up.
template <typename T>
struct Numeric;

template <>
struct Numeric<double> {
  using Acc = double;
  static constexpr DType kDType = DType::kFloat64;
};

template <>
struct Numeric<float> {
  using Acc = float;
  static constexpr DType kDType = DType::kFloat32;
};

template <>
struct Numeric<__nv_bfloat16> {
  using Acc = float;
  static constexpr DType kDType = DType::kBFloat16;
};

template <>
struct Numeric<__half> {
  using Acc = float;
  static constexpr DType kDType = DType::kFloat16;
};

template <typename T>
using AccOf = typename Numeric<T>::Acc;

__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_acc(AccOf<T> x);

template <>
__device__ __forceinline__ double from_acc<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ float from_acc<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}

// N values that move as one access; a pointer to it must be aligned to its size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  static_assert(sizeof(T) * kCount <= 16, "a thread moves at most 16 bytes at once");
  T lane[kCount];
};

// Element i of packed words, in the accumulator type.
template <typename T>
__device__ __forceinline__ AccOf<T> unpack(const uint32_t* words, int i);

template <>
__device__ __forceinline__ double unpack<double>(const uint32_t* words, int i) {
  return __hiloint2double(static_cast<int>(words[2 * i + 1]), static_cast<int>(words[2 * i]));
}
template <>
__device__ __forceinline__ float unpack<float>(const uint32_t* words, int i) {
  return __uint_as_float(words[i]);
}
template <>
__device__ __forceinline__ float unpack<__nv_bfloat16>(const uint32_t* words, int i) {
  return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}
template <>
__device__ __forceinline__ float unpack<__half>(const uint32_t* words, int i) {
  const __half_raw bits = {static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2])};
  return __half2float(__half(bits));
}

}  // namespace csb::cuda
