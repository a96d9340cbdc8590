#pragma once

#include "cpu/simd.h"

// Element types and their conversion to and from the type that the kernels compute in: float for 16-bit and float32,
// double for float64. Kernel header: see kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// U is uint32_t or a vector of it, F float or a vector of it. No branch and no instruction beyond the integer set, so
// the same text serves every instruction set, and rounding does not depend on it.
template <typename F, typename U>
CSB_INLINE F widen(const U& bits, BFloat16) {
  return bit_cast<F>(bits << 16);
}

template <typename F, typename U>
CSB_INLINE F widen(const U& bits, Float16) {
  const U magnitude = bits & 0x7fffu;
  const U rebias = U{} + (112u << 23);
  const U normal = (magnitude << 13) + rebias;
  // Subnormals count units of 2^-24, which is the last place of 0.5.
  const U half = U{} + (126u << 23);
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude + half) - bit_cast<F>(half));
  const U finite = magnitude < 0x400u ? subnormal : normal;
  const U all = magnitude >= 0x7c00u ? normal + rebias : finite;
  return bit_cast<F>(all | ((bits & 0x8000u) << 16));
}

template <typename U, typename F>
CSB_INLINE U narrow(const F& value, BFloat16) {
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet_nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

template <typename U, typename F>
CSB_INLINE U narrow(const F& value, Float16) {
  const U bits = bit_cast<U>(value);
  const U magnitude = bits & 0x7fffffffu;
  const U half = U{} + (126u << 23);
  // Adding 0.5 rounds to units of 2^-24, half precision's last place below 2^-14.
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + bit_cast<F>(half)) - half;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U finite = magnitude < (113u << 23) ? subnormal : normal;
  const U infinity = U{} + 0x7c00u;
  const U quiet_nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const U not_finite = magnitude > 0x7f800000u ? quiet_nan : infinity;
  return (magnitude >= (143u << 23) ? not_finite : finite) | ((bits >> 16) & 0x8000u);
}

template <typename T>
CSB_INLINE Compute<T> to_compute(T value) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    return value;
  } else {
    return widen<float, uint32_t>(value.bits, T{});
  }
}

template <typename T>
CSB_INLINE T from_compute(Compute<T> value) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    return value;
  } else {
    return T{static_cast<uint16_t>(narrow<uint32_t, float>(value, T{}))};
  }
}

template <typename T, int kCount>
CSB_INLINE Vector<Compute<T>, kCount> load_compute(const T* from) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    return load_vector<Vector<T, kCount>>(from);
  } else {
    const auto bits = load_vector<Vector<uint16_t, kCount>>(from);
    using U = Vector<uint32_t, kCount>;
    return widen<Vector<float, kCount>, U>(__builtin_convertvector(bits, U), T{});
  }
}

template <typename T, int kCount>
CSB_INLINE void store_compute(const Vector<Compute<T>, kCount>& value, T* to) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    store_vector(value, to);
  } else {
    const auto bits = narrow<Vector<uint32_t, kCount>, Vector<float, kCount>>(value, T{});
    using Bits = Vector<uint16_t, kCount>;
    store_vector<Bits>(__builtin_convertvector(bits, Bits), to);
  }
}

template <typename T>
CSB_INLINE void load_run(const T* from, Compute<T>* to, int64_t count) {
  constexpr int kCount = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) store_vector(load_compute<T, kCount>(from + i), to + i);
  for (; i < count; ++i) to[i] = to_compute(from[i]);
}

template <typename T>
CSB_INLINE void store_run(const Compute<T>* from, T* to, int64_t count) {
  using C = Compute<T>;
  constexpr int kCount = kLanes<C>;
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) store_compute<T, kCount>(load_vector<Vector<C, kCount>>(from + i), to + i);
  for (; i < count; ++i) to[i] = from_compute<T>(from[i]);
}

}  // namespace csb::cpu::CSB_CPU_ISA
