#pragma once

#include "cpu/numeric.h"

// The entries of a block, decoded in chunks for the kernels that walk them row by row. Kernel header: see
// kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

// Entries: offsets that stay in a first-level cache beside the tiles.
constexpr int32_t kChunkEntries = 2048;

// What memory needs to bring a line while others are multiplied. A prefetch behind the arrays does nothing.
constexpr int32_t kAheadEntries = 1280;

// A row's part of a chunk is `row << 16 | first entry`.
struct DecodedRows {
  alignas(64) uint32_t offset[kChunkEntries];  // of each entry's column in the tile, in bytes
  uint32_t start[256 + 16];                    // of rows that have entries; one more ends the last
  int32_t count;                               // of rows
};

// What both rows and columns of the tiles need, in bytes, without where the rows begin.
struct DecodedEntries {
  uint32_t row[kChunkEntries];
  uint32_t col[kChunkEntries];
};

CSB_INLINE uint32_t code_column(uint32_t code, int32_t block_shift, uint32_t flipped) {
  return (code & ((1u << block_shift) - 1)) ^ (((code >> block_shift) & flipped) << 3);
}

template <typename C>
CSB_INLINE void decode_entries(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift,
                               uint32_t row_bytes, uint32_t col_bytes, DecodedEntries& entries) {
  const uint32_t flipped = static_cast<uint32_t>(swizzle(7, block_shift)) >> 3;
  constexpr int32_t kCount = kLanes<uint32_t>;
  using V = Vector<uint32_t, kCount>;
  int32_t e = 0;
  for (; e + kCount <= count; e += kCount) {
    __builtin_prefetch(codes + e + kAheadEntries);
    __builtin_prefetch(values + e + kAheadEntries);
    const V code = __builtin_convertvector((load_vector<Vector<uint16_t, kCount>>(codes + e)), V);
    const V row = code >> static_cast<uint32_t>(block_shift);
    const V col = (code & ((1u << block_shift) - 1)) ^ ((row & flipped) << 3);
    store_vector(V(row * row_bytes), entries.row + e);
    store_vector(V(col * col_bytes), entries.col + e);
  }
  for (; e < count; ++e) {
    entries.row[e] = (static_cast<uint32_t>(codes[e]) >> block_shift) * row_bytes;
    entries.col[e] = code_column(codes[e], block_shift, flipped) * col_bytes;
  }
}

#if defined(__x86_64__) && CSB_VECTOR_BYTES == 64

CSB_INLINE __mmask16 first_lanes(int32_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1);
}

// Decodes sixteen entries at a time and notes where rows begin.
class Decoder {
 public:
  CSB_INLINE Decoder(int32_t block_shift, uint32_t* start)
      : col_mask_(_mm512_set1_epi32((1 << block_shift) - 1)),
        flipped_(_mm512_set1_epi32(swizzle(7, block_shift) >> 3)),
        shift_(_mm_cvtsi32_si128(block_shift)),
        place_(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
        last_row_(_mm512_set1_epi32(-1)),
        start_(start) {}

  // The columns of the next sixteen entries, as far as they are present.
  CSB_INLINE __m512i next(const uint16_t* codes, __mmask16 present) {
    const __m512i code = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, codes));
    const __m512i row = _mm512_srl_epi32(code, shift_);
    const __mmask16 starts = _mm512_mask_cmpneq_epi32_mask(present, row, _mm512_alignr_epi32(row, last_row_, 15));
    const __m512i start = _mm512_or_si512(_mm512_slli_epi32(row, 16), place_);
    _mm512_storeu_si512(start_, _mm512_maskz_compress_epi32(starts, start));
    start_ += __builtin_popcount(starts);
    last_row_ = row;
    place_ = _mm512_add_epi32(place_, _mm512_set1_epi32(16));
    const __m512i flip = _mm512_slli_epi32(_mm512_and_si512(row, flipped_), 3);
    return _mm512_xor_si512(_mm512_and_si512(code, col_mask_), flip);
  }

  // Behind the last row stand as many without entries as make up sixteen.
  CSB_INLINE uint32_t* finish(int32_t count) {
    _mm512_storeu_si512(start_, _mm512_set1_epi32(count));
    return start_;
  }

 private:
  const __m512i col_mask_;
  const __m512i flipped_;
  const __m128i shift_;
  __m512i place_;
  __m512i last_row_;
  uint32_t* start_;
};

template <typename C>
CSB_INLINE void decode_rows(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift,
                            uint32_t row_bytes, DecodedRows& rows) {
  const __m512i bytes = _mm512_set1_epi32(static_cast<int32_t>(row_bytes));
  Decoder decoder(block_shift, rows.start);
  for (int32_t e = 0; e < count; e += 16) {
    __builtin_prefetch(codes + e + kAheadEntries);
    __builtin_prefetch(values + e + kAheadEntries);
    const __m512i col = decoder.next(codes + e, first_lanes(count - e));
    _mm512_store_si512(rows.offset + e, _mm512_mullo_epi32(col, bytes));
  }
  rows.count = static_cast<int32_t>(decoder.finish(count) - rows.start);
}

#elif defined(__x86_64__) && CSB_VECTOR_BYTES == 32

// For each set of eight lanes, the lanes in it first.
struct LanesFirst {
  uint8_t lane[256][8] = {};

  constexpr LanesFirst() {
    for (int set = 0; set < 256; ++set) {
      int found = 0;
      for (uint8_t i = 0; i < 8; ++i) {
        if (set >> i & 1) lane[set][found++] = i;
      }
    }
  }
};

inline constexpr LanesFirst kLanesFirst;

// Decodes whole vectors and notes where rows begin; returns the first entry that is left, and in `found` the rows.
template <typename C>
CSB_INLINE int32_t decode_eights(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift,
                                 uint32_t row_bytes, DecodedRows& rows, int32_t& found) {
  const __m256i col_mask = _mm256_set1_epi32((1 << block_shift) - 1);
  const __m256i flipped = _mm256_set1_epi32(swizzle(7, block_shift) >> 3);
  const __m256i bytes = _mm256_set1_epi32(static_cast<int32_t>(row_bytes));
  const __m128i shift = _mm_cvtsi32_si128(block_shift);
  const __m256i turn = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
  __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i last = _mm256_set1_epi32(-1);
  int32_t e = 0;
  for (; e + 8 <= count; e += 8) {
    __builtin_prefetch(codes + e + kAheadEntries);
    __builtin_prefetch(values + e + kAheadEntries);
    const __m256i code = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + e)));
    const __m256i row = _mm256_srl_epi32(code, shift);
    const __m256i flip = _mm256_slli_epi32(_mm256_and_si256(row, flipped), 3);
    const __m256i col = _mm256_xor_si256(_mm256_and_si256(code, col_mask), flip);
    _mm256_store_si256(reinterpret_cast<__m256i*>(rows.offset + e), _mm256_mullo_epi32(col, bytes));
    const __m256i turned = _mm256_permutevar8x32_epi32(row, turn);
    const __m256i same = _mm256_cmpeq_epi32(row, _mm256_blend_epi32(turned, last, 1));
    last = turned;
    const int starts = _mm256_movemask_ps(_mm256_castsi256_ps(same)) ^ 0xff;
    const auto* lanes = reinterpret_cast<const __m128i*>(kLanesFirst.lane[starts]);
    const __m256i first = _mm256_cvtepu8_epi32(_mm_loadl_epi64(lanes));
    const __m256i start = _mm256_or_si256(_mm256_slli_epi32(row, 16), place);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows.start + found), _mm256_permutevar8x32_epi32(start, first));
    found += __builtin_popcount(static_cast<uint32_t>(starts));
    place = _mm256_add_epi32(place, _mm256_set1_epi32(8));
  }
  return e;
}

#else

template <typename C>
CSB_INLINE int32_t decode_eights(const uint16_t*, const C*, int32_t, int32_t, uint32_t, DecodedRows&, int32_t&) {
  return 0;
}

#endif

#if CSB_VECTOR_BYTES < 64

template <typename C>
CSB_INLINE void decode_rows(const uint16_t* codes, const C* values, int32_t count, int32_t block_shift,
                            uint32_t row_bytes, DecodedRows& rows) {
  const uint32_t col_mask = (1u << block_shift) - 1;
  const uint32_t flipped = static_cast<uint32_t>(swizzle(7, block_shift)) >> 3;
  constexpr int32_t kCount = kLanes<uint32_t>;
  using V = Vector<uint32_t, kCount>;
  int32_t found = 0;
  const int32_t begin = decode_eights(codes, values, count, block_shift, row_bytes, rows, found);
  int32_t e = begin;
  for (; e + kCount <= count; e += kCount) {
    __builtin_prefetch(codes + e + kAheadEntries);
    __builtin_prefetch(values + e + kAheadEntries);
    const V code = __builtin_convertvector((load_vector<Vector<uint16_t, kCount>>(codes + e)), V);
    const V col = (code & col_mask) ^ (((code >> static_cast<uint32_t>(block_shift)) & flipped) << 3);
    store_vector(V(col * row_bytes), rows.offset + e);
  }
  for (; e < count; ++e) rows.offset[e] = code_column(codes[e], block_shift, flipped) * row_bytes;
  // Every entry writes where the next start belongs, and only the first of a row lets it stay: a branch would be
  // mispredicted.
  uint32_t last_row = begin == 0 ? ~0u : static_cast<uint32_t>(codes[begin - 1]) >> block_shift;
  for (e = begin; e < count; ++e) {
    const uint32_t row = static_cast<uint32_t>(codes[e]) >> block_shift;
    rows.start[found] = row << 16 | static_cast<uint32_t>(e);
    found += row != last_row;
    last_row = row;
  }
  rows.start[found] = static_cast<uint32_t>(count);
  rows.count = found;
}

#endif

}  // namespace csb::cpu::CSB_CPU_ISA
