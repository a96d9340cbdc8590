#include "baseline/cpu/row_split.h"

#include "baseline/cpu/numeric.h"

namespace csb::baseline::cpu {
namespace {

constexpr int kVectorBytes = 64;  // of the widest instruction set
constexpr int kVectorsPerTile = 4;

// Columns [first, first + kVectors * kLanes). The two loops over columns are what GCC needs in order to keep the sums
// in registers; of one loop it makes scalar code.
template <typename T, int kVectors, int kLanes>
CSB_INLINE void multiply_tile(const CsrSpmmProblem& p, int64_t begin, int64_t end, int64_t first) {
  const T* const values = static_cast<const T*>(p.values);
  const T* const x = static_cast<const T*>(p.x) + first;
  T* const y = static_cast<T*>(p.y) + first;
  for (int64_t row = begin; row < end; ++row) {
    AccOf<T> sum[kVectors][kLanes] = {};
    for (int32_t e = p.w.row_ptr[row]; e < p.w.row_ptr[row + 1]; ++e) {
      const AccOf<T> value = to_acc(values[e]);
      const T* const from = x + p.w.col_ind[e] * p.n;
      for (int v = 0; v < kVectors; ++v) {
        for (int j = 0; j < kLanes; ++j) sum[v][j] += value * to_acc(from[v * kLanes + j]);
      }
    }
    T* const to = y + row * p.n;
    for (int v = 0; v < kVectors; ++v) {
      for (int j = 0; j < kLanes; ++j) from_acc(sum[v][j], to[v * kLanes + j]);
    }
  }
}

// The tile is the outer loop, so that its part of X stays in cache from row to row. What no whole tile covers is left
// to tiles of half the width, down to one column.
template <typename T, int kVectors, int kLanes>
CSB_INLINE void multiply_tiles(const CsrSpmmProblem& p, int64_t begin, int64_t end, int64_t first) {
  constexpr int kWidth = kVectors * kLanes;
  for (; first + kWidth <= p.n; first += kWidth) multiply_tile<T, kVectors, kLanes>(p, begin, end, first);
  if constexpr (kVectors > 1) {
    multiply_tiles<T, kVectors / 2, kLanes>(p, begin, end, first);
  } else if constexpr (kLanes > 1) {
    multiply_tiles<T, 1, kLanes / 2>(p, begin, end, first);
  }
}

template <typename T>
CSB_INLINE void multiply(const CsrSpmmProblem& p, int64_t begin, int64_t end) {
  multiply_tiles<T, kVectorsPerTile, kVectorBytes / static_cast<int>(sizeof(AccOf<T>))>(p, begin, end, 0);
}

}  // namespace

CSB_DEFINE_FOR_EACH_ISA(row_split, multiply, CsrSpmmProblem)

}  // namespace csb::baseline::cpu
