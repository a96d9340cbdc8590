#pragma once

#include "cpu/rows.h"

// One block times one column: all products first, sixteen at a time, then the sums of sixteen rows at a time. AVX-512
// only: it has masks. Kernel header: see kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

#if defined(__x86_64__) && CSB_VECTOR_BYTES == 64

// Lane i is the sum of the lanes of v[i]: four rounds, each of which adds the halves of two vectors into one.
CSB_INLINE __m512 sum_lanes(const __m512 (&v)[16]) {
  __m512 pairs[8];
  CSB_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 low = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    pairs[i] = _mm512_add_ps(low, _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  }
  __m512 fours[4];
  CSB_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(pairs[2 * i]);
    const __m512d odd = _mm512_castps_pd(pairs[2 * i + 1]);
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
    fours[i] = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return fold(fold(fours[0], fours[1]), fold(fours[2], fours[3]));
}

CSB_INLINE __m512 add_run(const float* product, int32_t count) {
  __m512 sum = _mm512_maskz_loadu_ps(first_lanes(count), product);
  for (; count > 16; count -= 16) {
    product += 16;
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(count - 16), product));
  }
  return sum;
}

// F: out[row] += value * in[col]
inline void column_block(const uint16_t* codes, const float* values, int32_t count, int32_t block_shift,
                         const float* in, uint32_t /*in_stride*/, float* out) {
  alignas(64) float product[kChunkEntries];
  uint32_t start[256 + 16];
  for (int32_t done = 0; done < count; done += kChunkEntries) {
    const int32_t part = min_of(kChunkEntries, count - done);
    Decoder decoder(block_shift, start);
    for (int32_t e = 0; e < part; e += 16) {
      __builtin_prefetch(codes + done + e + kAheadEntries);
      __builtin_prefetch(values + done + e + kAheadEntries);
      const __mmask16 present = first_lanes(part - e);
      const __m512i col = decoder.next(codes + done + e, present);
      const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present, col, in, 4);
      _mm512_store_ps(product + e, _mm512_mul_ps(x, _mm512_maskz_loadu_ps(present, values + done + e)));
    }
    const uint32_t* const end = decoder.finish(part);
    for (const uint32_t* at = start; at < end; at += 16) {
      __m512 sum[16];
      CSB_UNROLL
      for (int i = 0; i < 16; ++i) {
        const int32_t first = at[i] & 0xffff;
        sum[i] = add_run(product + first, static_cast<int32_t>(at[i + 1] & 0xffff) - first);
      }
      const __mmask16 present = first_lanes(static_cast<int32_t>(end - at));
      const __m512i row = _mm512_srli_epi32(_mm512_loadu_si512(at), 16);
      // In quarter_major order a row may come back among the sixteen, which a scatter would add but once.
      const __m512i row_before = _mm512_alignr_epi32(row, _mm512_set1_epi32(-1), 15);
      if (_mm512_mask_cmple_epi32_mask(present, row, row_before) != 0) {
        alignas(64) float sums[16];
        _mm512_store_ps(sums, sum_lanes(sum));
        for (int i = 0; i < 16 && at + i < end; ++i) out[at[i] >> 16] += sums[i];
        continue;
      }
      const __m512 before = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present, row, out, 4);
      _mm512_mask_i32scatter_ps(out, present, row, _mm512_add_ps(before, sum_lanes(sum)), 4);
    }
  }
}

#endif

}  // namespace csb::cpu::CSB_CPU_ISA
