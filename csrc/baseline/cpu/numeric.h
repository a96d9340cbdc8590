#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "baseline/csr.h"

// What both CPU baselines share: element types, and one body compiled for each instruction set. The loops are plain C++
// that the compiler vectorises.
namespace csb::baseline::cpu {

#define CSB_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

CSB_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CSB_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

constexpr uint32_t kHalf = 126u << 23;    // as a float 0.5, whose last place is the smallest float16
constexpr uint32_t kRebias = 112u << 23;  // from the exponent of a float16 to that of a float

// Reading has no branch and no selection, or the loops around it would not be vectorised.
CSB_INLINE double to_acc(double value) { return value; }
CSB_INLINE float to_acc(float value) { return value; }
CSB_INLINE float to_acc(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

CSB_INLINE float to_acc(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t subnormal = bits_of(float_of(kHalf + magnitude) - float_of(kHalf));
  const uint32_t normal = (magnitude << 13) + kRebias;
  const uint32_t is_subnormal = 0u - ((magnitude - 0x400u) >> 31);  // every bit or none
  const uint32_t is_infinite = 0u - ((magnitude + 0x400u) >> 15);   // or NaN
  const uint32_t bits = (normal ^ ((normal ^ subnormal) & is_subnormal)) + (is_infinite & kRebias);
  return float_of(bits | (value.bits & 0x8000u) << 16);
}

CSB_INLINE void from_acc(double value, double& to) { to = value; }
CSB_INLINE void from_acc(float value, float& to) { to = value; }

CSB_INLINE void from_acc(float value, BFloat16& to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  to.bits = static_cast<uint16_t>((value == value ? rounded : bits | 0x400000u) >> 16);
}

CSB_INLINE void from_acc(float value, Float16& to) {
  constexpr uint32_t kSmallestNormal = 113u << 23;
  constexpr uint32_t kOverflow = 143u << 23;
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = bits_of(float_of(magnitude) + float_of(kHalf)) - kHalf;
  const uint32_t normal = (magnitude - kRebias + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
  const uint32_t infinite = value == value ? 0x7c00u : 0x7e00u;
  to.bits = static_cast<uint16_t>((magnitude < kOverflow ? finite : infinite) | (bits >> 16 & 0x8000u));
}

enum class Isa { kDefault, kAvx2, kAvx512 };

// What the machine has, no wider than torch is told to go.
inline Isa isa() {
#if defined(__x86_64__)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool only_default = limit != nullptr && std::strcmp(limit, "default") == 0;
  const bool only_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && !only_default && !only_avx2) return Isa::kAvx512;
  if (avx2 && !only_default) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

#define CSB_BODY_FOR_DTYPE(body, problem, begin, end) \
  switch ((problem).dtype) {                          \
    case DType::kFloat64:                             \
      return body<double>(problem, begin, end);       \
    case DType::kFloat32:                             \
      return body<float>(problem, begin, end);        \
    case DType::kBFloat16:                            \
      return body<BFloat16>(problem, begin, end);     \
    case DType::kFloat16:                             \
      return body<Float16>(problem, begin, end);      \
  }                                                   \
  __builtin_trap()

// Defines `function` as `body`, a template over the element type that is always inlined, for this machine.
#if defined(__x86_64__)
#define CSB_DEFINE_FOR_EACH_ISA(function, body, Problem)                                                 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) static void function##_avx512(       \
      const Problem& problem, int64_t begin, int64_t end) {                                              \
    CSB_BODY_FOR_DTYPE(body, problem, begin, end);                                                       \
  }                                                                                                      \
  __attribute__((target("avx2,fma"))) static void function##_avx2(const Problem& problem, int64_t begin, \
                                                                  int64_t end) {                         \
    CSB_BODY_FOR_DTYPE(body, problem, begin, end);                                                       \
  }                                                                                                      \
  static void function##_default(const Problem& problem, int64_t begin, int64_t end) {                   \
    CSB_BODY_FOR_DTYPE(body, problem, begin, end);                                                       \
  }                                                                                                      \
  void function(const Problem& problem, int64_t begin, int64_t end) {                                    \
    static const Isa chosen = isa();                                                                     \
    if (chosen == Isa::kAvx512) return function##_avx512(problem, begin, end);                           \
    if (chosen == Isa::kAvx2) return function##_avx2(problem, begin, end);                               \
    function##_default(problem, begin, end);                                                             \
  }
#else
#define CSB_DEFINE_FOR_EACH_ISA(function, body, Problem) \
  void function(const Problem& problem, int64_t begin, int64_t end) { CSB_BODY_FOR_DTYPE(body, problem, begin, end); }
#endif

}  // namespace csb::baseline::cpu
