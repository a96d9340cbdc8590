#pragma once

#include "cuda/device/numeric.cuh"

namespace csb::cuda {

// The comparisons let NaN through, as torch's relu and relu6 do.
template <typename Acc>
__device__ __forceinline__ Acc activate(Acc x, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return x < Acc(0) ? Acc(0) : x;
    case Activation::kRelu6:
      return x < Acc(0) ? Acc(0) : (x > Acc(6) ? Acc(6) : x);
    case Activation::kSilu:
      return x / (Acc(1) + exp(-x));
    case Activation::kGelu:
      return Acc(0.5) * x * (Acc(1) + erf(x * Acc(0.70710678118654752440)));
    case Activation::kNone:
      break;
  }
  return x;
}

// The last step of Y = act(W . X + bias), from the accumulator of one element to its stored value.
template <typename T>
struct Epilogue {
  const T* bias;  // [out_features], may be null
  Activation activation;

  __device__ __forceinline__ AccOf<T> bias_of(int32_t feature) const {
    return bias == nullptr ? AccOf<T>(0) : to_acc(bias[feature]);
  }
  __device__ __forceinline__ T finish(AccOf<T> sum, AccOf<T> bias_value) const {
    return from_acc<T>(activate(sum + bias_value, activation));
  }
};

template <typename T>
__host__ __device__ __forceinline__ Epilogue<T> epilogue_of(const SpmmProblem& problem) {
  return {static_cast<const T*>(problem.bias), problem.activation};
}

}  // namespace csb::cuda
