#include "cpu/convert.h"

#include <algorithm>

#include "cpu/scratch.h"

namespace csb::cpu {
namespace {

constexpr int32_t kMaxBlockSize = 256;

// Element (row, col) and its neighbours of one row; converting moves bits, so only the element's size is a type.
template <typename Bits>
struct Segment {
  const Bits* weight;
  const uint8_t* mask;
  int32_t length;
};

// Everything but the sign is zero in +0 and -0 alone, in every floating-point format.
template <typename Bits>
inline bool is_zero(Bits bits) {
  return static_cast<Bits>(bits << 1) == 0;
}

template <typename Bits>
Segment<Bits> segment(const ConvertProblem& p, int32_t row, int32_t block_col) {
  const int64_t col = int64_t{block_col} << p.w.block_shift;
  return {static_cast<const Bits*>(p.dense) + row * p.stride_row + col * p.stride_col,
          p.mask == nullptr ? nullptr : p.mask + row * p.mask_stride_row + col * p.mask_stride_col,
          static_cast<int32_t>(min_of<int64_t>(p.w.block_size(), p.w.k - col))};
}

template <typename Bits>
int32_t count_kept(const ConvertProblem& p, const Segment<Bits>& s) {
  int32_t kept = 0;
  if (s.mask != nullptr) {
    for (int32_t j = 0; j < s.length; ++j) kept += s.mask[j * p.mask_stride_col] != 0;
  } else if (p.stride_col == 1) {
    for (int32_t j = 0; j < s.length; ++j) kept += !is_zero(s.weight[j]);
  } else {
    for (int32_t j = 0; j < s.length; ++j) kept += !is_zero(s.weight[j * p.stride_col]);
  }
  return kept;
}

// Columns of the kept elements. Every step writes and only a kept element advances: no branch to mispredict.
template <typename Bits>
int32_t list_kept(const ConvertProblem& p, const Segment<Bits>& s, uint16_t* cols) {
  int32_t kept = 0;
  if (s.mask != nullptr) {
    for (int32_t j = 0; j < s.length; ++j) {
      cols[kept] = static_cast<uint16_t>(j);
      kept += s.mask[j * p.mask_stride_col] != 0;
    }
  } else {
    for (int32_t j = 0; j < s.length; ++j) {
      cols[kept] = static_cast<uint16_t>(j);
      kept += !is_zero(s.weight[j * p.stride_col]);
    }
  }
  return kept;
}

int32_t row_end(const ConvertProblem& p, int64_t block_row) {
  return static_cast<int32_t>(min_of<int64_t>(p.w.m, (block_row + 1) << p.w.block_shift));
}

template <typename Bits>
void count_block_row(const ConvertProblem& p, int64_t block_row) {
  int32_t* counts = p.counts + block_row * p.w.kb;
  std::fill_n(counts, p.w.kb, 0);
  for (int32_t row = static_cast<int32_t>(block_row << p.w.block_shift); row < row_end(p, block_row); ++row) {
    for (int32_t col = 0; col < p.w.kb; ++col) counts[col] += count_kept(p, segment<Bits>(p, row, col));
  }
}

template <typename Bits>
void pack_block_row(const ConvertProblem& p, int64_t block_row) {
  const int32_t first_block = static_cast<int32_t>(block_row) * p.w.kb;
  Bits* values = static_cast<Bits*>(p.values);
  ScratchCutter scratch(ScratchCutter::bytes<int32_t>(p.w.kb));
  int32_t* next = scratch.take<int32_t>(p.w.kb);
  std::copy_n(p.w.blk_ptr + first_block, p.w.kb, next);
  uint16_t cols[kMaxBlockSize];
  const int32_t first_row = static_cast<int32_t>(block_row << p.w.block_shift);
  for (int32_t row = first_row; row < row_end(p, block_row); ++row) {
    for (int32_t block_col = 0; block_col < p.w.kb; ++block_col) {
      const Segment<Bits> s = segment<Bits>(p, row, block_col);
      // A matrix that changed since it was counted must not push a block into its neighbour.
      const int32_t kept = min_of(list_kept(p, s, cols), p.w.end(first_block + block_col) - next[block_col]);
      for (int32_t i = 0; i < kept; ++i) {
        const int32_t e = next[block_col] + i;
        p.codes[e] = static_cast<uint16_t>(encode(row - first_row, cols[i], p.w.block_shift));
        values[e] = s.weight[cols[i] * p.stride_col];
      }
      next[block_col] += kept;
    }
  }
  for (int32_t block_col = 0; block_col < p.w.kb; ++block_col) {
    for (int32_t e = next[block_col]; e < p.w.blk_ptr[first_block + block_col + 1]; ++e) {
      p.codes[e] = 0;
      values[e] = 0;
    }
  }
}

template <typename Bits>
void unpack_block_row(const ConvertProblem& p, int64_t block_row) {
  const int32_t first_row = static_cast<int32_t>(block_row << p.w.block_shift);
  Bits* dense = static_cast<Bits*>(p.dense);
  const Bits* values = static_cast<const Bits*>(p.values);
  for (int32_t row = first_row; row < row_end(p, block_row); ++row) {
    Bits* to = dense + row * p.stride_row;
    if (p.stride_col == 1) {
      std::fill_n(to, p.w.k, Bits{0});
    } else {
      for (int32_t col = 0; col < p.w.k; ++col) to[col * p.stride_col] = 0;
    }
  }
  for (int32_t block_col = 0; block_col < p.w.kb; ++block_col) {
    const int32_t block = static_cast<int32_t>(block_row) * p.w.kb + block_col;
    Bits* to = dense + first_row * p.stride_row + (int64_t{block_col} << p.w.block_shift) * p.stride_col;
    for (int32_t e = p.w.begin(block); e < p.w.end(block); ++e) {
      const int32_t code = p.w.codes[e];
      to[code_row(code, p.w.block_shift) * p.stride_row + code_col(code, p.w.block_shift) * p.stride_col] = values[e];
    }
  }
}

constexpr int32_t kBitmapShift = 6;

// Calls visit(row, first column, column behind the last) for the rows of each quarter, in quarter_major order, for the
// part of a block inside the matrix.
template <typename Visit>
void for_quarter_rows(const CsbView& w, int32_t block, const Visit& visit) {
  const int32_t rows = min_of(w.m - (block / w.kb << kBitmapShift), 1 << kBitmapShift);
  const int32_t cols = min_of(w.k - (block % w.kb << kBitmapShift), 1 << kBitmapShift);
  for (int32_t first = 0; first < cols; first += 16) {
    for (int32_t row = 0; row < rows; ++row) visit(row, first, min_of(first + 16, cols));
  }
}

template <typename Bits>
void pack_bitmap_block(const ConvertProblem& p, int32_t block) {
  uint32_t* words = p.bitmap + int64_t{block} * kBitmapWords;
  std::fill_n(words, kBitmapWords, 0);
  Bits* values = static_cast<Bits*>(p.values);
  const int32_t first_row = block / p.w.kb << kBitmapShift;
  int32_t e = p.w.begin(block);
  const int32_t end = p.w.end(block);
  for_quarter_rows(p.w, block, [&](int32_t row, int32_t first, int32_t last) {
    const Segment<Bits> s = segment<Bits>(p, first_row + row, block % p.w.kb);
    for (int32_t col = first; col < last; ++col) {
      const Bits weight = s.weight[col * p.stride_col];
      if ((s.mask != nullptr ? s.mask[col * p.mask_stride_col] == 0 : is_zero(weight)) || e >= end) continue;
      words[bitmap_word(row, col)] |= uint32_t{1} << bitmap_bit(row, col);
      values[e++] = weight;
    }
  });
  for (; e < p.w.blk_ptr[block + 1]; ++e) values[e] = 0;
}

template <typename Bits>
void pack_bitmap_block_row(const ConvertProblem& p, int64_t block_row) {
  for (int32_t col = 0; col < p.w.kb; ++col) {
    pack_bitmap_block<Bits>(p, static_cast<int32_t>(block_row) * p.w.kb + col);
  }
}

void codes_of_block(const ConvertProblem& p, int32_t block) {
  const uint32_t* words = p.w.bitmap + int64_t{block} * kBitmapWords;
  int32_t e = p.w.begin(block);
  const int32_t end = p.w.end(block);
  for_quarter_rows(p.w, block, [&](int32_t row, int32_t first, int32_t last) {
    const uint32_t word = words[bitmap_word(row, first)];
    if (word == 0) return;
    for (int32_t col = first; col < last; ++col) {
      if ((word >> bitmap_bit(row, col) & 1) == 0 || e >= end) continue;
      p.codes[e++] = static_cast<uint16_t>(encode(row, col, kBitmapShift));
    }
  });
  for (; e < p.w.blk_ptr[block + 1]; ++e) p.codes[e] = 0;
}

// Calls one of the three for every block row of a range.
template <typename Two, typename Four, typename Eight>
void for_block_rows(const ConvertProblem& p, int64_t begin, int64_t end, Two two, Four four, Eight eight) {
  for (int64_t row = begin; row < end; ++row) {
    switch (p.dtype) {
      case DType::kFloat64:
        eight(p, row);
        continue;
      case DType::kFloat32:
        four(p, row);
        continue;
      case DType::kBFloat16:
      case DType::kFloat16:
        two(p, row);
        continue;
    }
    __builtin_trap();
  }
}

}  // namespace

int64_t convert_tasks(const ConvertProblem& p) { return p.w.mb; }

void count(const ConvertProblem& p, int64_t begin, int64_t end) {
  for_block_rows(p, begin, end, count_block_row<uint16_t>, count_block_row<uint32_t>, count_block_row<uint64_t>);
}

void pack(const ConvertProblem& p, int64_t begin, int64_t end) {
  for_block_rows(p, begin, end, pack_block_row<uint16_t>, pack_block_row<uint32_t>, pack_block_row<uint64_t>);
}

void unpack(const ConvertProblem& p, int64_t begin, int64_t end) {
  for_block_rows(p, begin, end, unpack_block_row<uint16_t>, unpack_block_row<uint32_t>, unpack_block_row<uint64_t>);
}

void pack_bitmap(const ConvertProblem& p, int64_t begin, int64_t end) {
  for_block_rows(p, begin, end, pack_bitmap_block_row<uint16_t>, pack_bitmap_block_row<uint32_t>,
                 pack_bitmap_block_row<uint64_t>);
}

void to_codes(const ConvertProblem& p, int64_t begin, int64_t end) {
  for (int64_t block = begin * p.w.kb; block < end * p.w.kb; ++block) codes_of_block(p, static_cast<int32_t>(block));
}

}  // namespace csb::cpu
