#pragma once

#include "cpu/rows.h"

// One block times one column, sixteen entries at a time. AVX-512 only: it has gathers, scatters and masks. Kernel
// header: see kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

#if defined(__x86_64__) && CSB_VECTOR_BYTES == 64

// out[row] += the products of each row. The rows ascend, so a row's products stand side by side: four steps that add
// the neighbour 1, 2, 4 and 8 places to the left, where it is of the same row, leave a row's sum in its last place.
CSB_INLINE void add_rows(__mmask16 present, __mmask16 starts, __m512i row, __m512 product, float* out) {
  const __m512i none = _mm512_set1_epi32(-1);
  const auto add_left = [&](auto places) {
    constexpr int kPlaces = decltype(places)::value;
    const __m512i left_row = _mm512_alignr_epi32(row, none, 16 - kPlaces);
    const __m512i left = _mm512_alignr_epi32(_mm512_castps_si512(product), none, 16 - kPlaces);
    const __mmask16 same = _mm512_cmpeq_epi32_mask(row, left_row);
    product = _mm512_mask_add_ps(product, same, product, _mm512_castsi512_ps(left));
  };
  add_left(std::integral_constant<int, 1>{});
  add_left(std::integral_constant<int, 2>{});
  add_left(std::integral_constant<int, 4>{});
  add_left(std::integral_constant<int, 8>{});
  const uint32_t behind = (static_cast<uint32_t>(starts) | ~static_cast<uint32_t>(present)) >> 1 | 0x8000u;
  const __mmask16 last = static_cast<__mmask16>(behind & present);
  const __m512 sum = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), last, row, out, 4);
  _mm512_mask_i32scatter_ps(out, last, row, _mm512_add_ps(sum, product), 4);
}

// A row has no column twice: in T the entries of one row never meet.
template <bool kTransposed>
void column_block(const uint16_t* codes, const float* values, int32_t count, int32_t block_shift, const float* in,
                  float* out) {
  const __m512i col_mask = _mm512_set1_epi32((1 << block_shift) - 1);
  const __m512i flipped = _mm512_set1_epi32(swizzle(7, block_shift) >> 3);
  const __m128i shift = _mm_cvtsi32_si128(block_shift);
  for (int32_t e = 0; e < count; e += 16) {
    __builtin_prefetch(codes + e + kAheadEntries);
    __builtin_prefetch(values + e + kAheadEntries);
    const uint32_t all = count - e >= 16 ? 0xffffu : (1u << (count - e)) - 1;
    const __mmask16 present = static_cast<__mmask16>(all);
    const __m512i code = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, codes + e));
    const __m512 value = _mm512_maskz_loadu_ps(present, values + e);
    const __m512i row = _mm512_srl_epi32(code, shift);
    const __m512i flip = _mm512_slli_epi32(_mm512_and_si512(row, flipped), 3);
    const __m512i col = _mm512_xor_si512(_mm512_and_si512(code, col_mask), flip);
    const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present, kTransposed ? row : col, in, 4);
    const __m512 product = _mm512_mul_ps(value, x);
    if constexpr (kTransposed) {
      for (uint32_t left = all; left != 0;) {
        const int32_t first = codes[e + __builtin_ctz(left)] >> block_shift;
        const __mmask16 same =
            _mm512_mask_cmpeq_epi32_mask(static_cast<__mmask16>(left), row, _mm512_set1_epi32(first));
        const __m512 sum = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), same, col, out, 4);
        _mm512_mask_i32scatter_ps(out, same, col, _mm512_add_ps(sum, product), 4);
        left &= ~static_cast<uint32_t>(same);
      }
    } else {
      const __m512i before = _mm512_alignr_epi32(row, _mm512_set1_epi32(-1), 15);
      const __mmask16 starts = _mm512_mask_cmpneq_epi32_mask(present, row, before);
      if (starts == 1) {
        out[codes[e] >> block_shift] += _mm512_mask_reduce_add_ps(present, product);
      } else {
        add_rows(present, starts, row, product, out);
      }
    }
  }
}

#endif

}  // namespace csb::cpu::CSB_CPU_ISA
