#pragma once

#include "cpu/numeric.h"

// act(tile + bias) in place. Kernel header: see kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

// Comparisons are written so that NaN fails them and stays.
template <typename V>
CSB_INLINE V clamp_to(const V& value, const V& low, const V& high, bool has_high) {
  const V above = value < low ? low : value;
  return has_high ? V(above > high ? high : above) : above;
}

template <typename C>
CSB_INLINE C smooth(C value, Activation activation) {
  if (activation == Activation::kSilu) return value / (C(1) + std::exp(-value));
  return C(0.5) * value * (C(1) + std::erf(value * C(0.70710678118654752440)));
}

template <typename V, typename C>
CSB_INLINE void finish_vector(C bias, Activation activation, C* at) {
  V value = load_vector<V>(at);
  value += bias;
  if (activation == Activation::kRelu || activation == Activation::kRelu6) {
    value = clamp_to<V>(value, V{}, V{} + C(6), activation == Activation::kRelu6);
  }
  store_vector(value, at);
}

// Row f of the tile is feature f; bias points at the first of them or is null.
template <typename T>
inline void finish_tile(const T* bias, Activation activation, int32_t features, int32_t width, Compute<T>* tile) {
  using C = Compute<T>;
  if (bias == nullptr && activation == Activation::kNone) return;
  constexpr int32_t kCount = kLanes<C>;
  for (int32_t f = 0; f < features; ++f) {
    const C b = bias == nullptr ? C(0) : to_compute(bias[f]);
    C* row = tile + static_cast<int64_t>(f) * width;
    int32_t j = 0;
    for (; j + kCount <= width; j += kCount) finish_vector<Vector<C, kCount>>(b, activation, row + j);
    for (; j < width; ++j) finish_vector<C>(b, activation, row + j);
    if (activation == Activation::kSilu || activation == Activation::kGelu) {
      for (j = 0; j < width; ++j) row[j] = smooth(row[j], activation);
    }
  }
}

}  // namespace csb::cpu::CSB_CPU_ISA
