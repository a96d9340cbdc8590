#pragma once

#include "cpu/numeric.h"

// sum[e] += dot(A tile row of entry e, B tile row of entry e) for the entries of one block. Kernel header: see
// kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

template <typename C>
using DotKernel = void (*)(const uint16_t* codes, int32_t count, int32_t block_shift, const C* a, const C* b, C* sum);

template <typename C, int kWidth>
struct DotBlock {
  static constexpr int kCount = kWidth < kLanes<C> ? kWidth : kLanes<C>;
  using V = Vector<C, kCount>;

  static CSB_INLINE V multiply(uint32_t code, int32_t block_shift, uint32_t swizzle_mask, const C* a, const C* b) {
    const uint32_t row = code >> block_shift;
    const uint32_t col = (code & ((1u << block_shift) - 1)) ^ ((row & swizzle_mask) << 3);
    a += row * kWidth;
    b += col * kWidth;
    V sum = load_vector<V>(a) * load_vector<V>(b);
    CSB_UNROLL
    for (int i = kCount; i < kWidth; i += kCount) sum += load_vector<V>(a + i) * load_vector<V>(b + i);
    return sum;
  }

  static CSB_INLINE C add_lanes(const V& v) {
    C lanes[kCount];
    store_vector(v, lanes);
    CSB_UNROLL
    for (int half = kCount / 2; half > 0; half /= 2) {
      CSB_UNROLL
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }

  static CSB_INLINE V merge(const V& even, const V& odd) {
    return Interleave<C, kCount>::low(even, odd) + Interleave<C, kCount>::high(even, odd);
  }

  // {sum of v0, sum of v1, sum of v2, sum of v3}: two rounds leave lane i with a part of v[i % 4], halving does the
  // rest.
  static CSB_INLINE Vector<C, 4> add_lanes_of_four(const V (&v)[4]) {
    const V all = merge(merge(v[0], v[2]), merge(v[1], v[3]));
    return fold_to_four<kCount>(all);
  }

  template <int kFrom>
  static CSB_INLINE Vector<C, 4> fold_to_four(const Vector<C, kFrom>& v) {
    if constexpr (kFrom == 4) {
      return v;
    } else {
      Vector<C, kFrom / 2> halves[2];
      __builtin_memcpy(halves, &v, sizeof(v));
      return fold_to_four<kFrom / 2>(halves[0] + halves[1]);
    }
  }

  static void run(const uint16_t* codes, int32_t count, int32_t block_shift, const C* __restrict a,
                  const C* __restrict b, C* __restrict sum) {
    const uint32_t swizzle_mask = static_cast<uint32_t>(swizzle(7, block_shift)) >> 3;
    int32_t e = 0;
    if constexpr (kCount >= 4) {
      for (; e + 4 <= count; e += 4) {
        V v[4];
        CSB_UNROLL
        for (int i = 0; i < 4; ++i) v[i] = multiply(codes[e + i], block_shift, swizzle_mask, a, b);
        using Four = Vector<C, 4>;
        store_vector<Four>(load_vector<Four>(sum + e) + add_lanes_of_four(v), sum + e);
      }
    }
    for (; e < count; ++e) sum[e] += add_lanes(multiply(codes[e], block_shift, swizzle_mask, a, b));
  }
};

template <typename C>
struct DotBlock<C, 1> {
  static void run(const uint16_t* codes, int32_t count, int32_t block_shift, const C* __restrict a,
                  const C* __restrict b, C* __restrict sum) {
    for (int32_t e = 0; e < count; ++e) {
      const int32_t code = codes[e];
      sum[e] += a[code_row(code, block_shift)] * b[code_col(code, block_shift)];
    }
  }
};

template <typename C>
DotKernel<C> choose_dot_kernel(int32_t width) {
  switch (width) {
    case 1:
      return DotBlock<C, 1>::run;
    case 4:
      return DotBlock<C, 4>::run;
    case 8:
      return DotBlock<C, 8>::run;
    case 16:
      return DotBlock<C, 16>::run;
    case 32:
      return DotBlock<C, 32>::run;
    case 64:
      return DotBlock<C, 64>::run;
  }
  __builtin_trap();
}

}  // namespace csb::cpu::CSB_CPU_ISA
