#pragma once

#include "csb/problem.h"
#include "cuda/device/numeric.cuh"
#include "cuda/device/warp_tile.cuh"

namespace csb::cuda {

inline bool aligned_run(const DenseView& view, int32_t level) {
  return view.size[level] == 1 || view.stride[level] % 8 == 0;
}

// Whether 8 neighbouring elements along the tile's inner dimension are one aligned 16-byte piece of
// memory everywhere in the operand: features when !features_first, else columns.
inline bool operand_vectorized(const DenseView& view, bool features_first) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) return false;
  if (!features_first) {
    return view.stride_f == 1 && aligned_run(view, 0) && aligned_run(view, 1) && aligned_run(view, 2);
  }
  const bool one_run = view.size[0] == 1 && view.size[1] == 1;
  return view.stride_f % 8 == 0 && view.stride[2] == 1 && (one_run || view.size[2] % 8 == 0) && aligned_run(view, 0) &&
         aligned_run(view, 1);
}

// Which way the tile of an operand stands in shared memory: the way that memory has it.
inline bool operand_features_first(const DenseView& view) { return view.stride_f != 1 && view.stride[2] == 1; }

// An activation matrix as the tile loads see it: 16-bit elements, whatever their type.
struct Operand {
  const uint16_t* data;
  int64_t stride_f;
  int32_t features;
  bool vectorized;  // operand_vectorized()
};

__device__ __forceinline__ Operand make_operand(const DenseView& view, int32_t features, bool vectorized) {
  return {static_cast<const uint16_t*>(view.data), view.stride_f, features, vectorized};
}

// A tile of 64 features x kColumns columns in swizzled shared memory, [column][feature] or, with
// kFeaturesFirst, [feature][column]. Features and columns outside the matrix are zeros.
template <bool kFeaturesFirst, int kColumns, int kThreads>
struct OperandTile {
  static constexpr int kElements = 64 * kColumns;
  static constexpr int kWidth = kFeaturesFirst ? kColumns : 64;

  // Starts to fill the tile from feature `first` and the `columns` columns whose offsets are listed;
  // completes with the thread's current group of asynchronous copies.
  static __device__ __forceinline__ void load(uint16_t* tile, const Operand& x, int32_t first, const int64_t* offsets,
                                              int32_t columns, int32_t thread_idx) {
    // Whether 8 elements may be copied at once. At the edge of the matrix they may not, even though
    // an asynchronous copy can stop early: it still counts as a read of all 16 bytes.
    const auto whole = [&](int32_t row, int32_t col) {
      const int32_t feature_end = first + (kFeaturesFirst ? row + 1 : col + 8);
      const int32_t column_end = kFeaturesFirst ? col + 8 : row + 1;
      return x.vectorized && feature_end <= x.features && column_end <= columns;
    };
    if (x.vectorized) {
      each_piece<kPieces>(thread_idx, [&](int32_t row, int32_t col) {
        if (!whole(row, col)) return;
        const int32_t feature = first + (kFeaturesFirst ? row : col);
        const int64_t offset = offsets[kFeaturesFirst ? col : row] + (kFeaturesFirst ? feature * x.stride_f : feature);
        copy_async_16(tile + tile_offset<kWidth>(row, col), x.data + offset);
      });
      if (first + 64 <= x.features && columns == kColumns) return;
    }
    each_piece<1>(thread_idx, [&](int32_t row, int32_t col) {
      if (whole(row, col)) return;
      Vector<uint16_t, 8> piece{};
      const bool touches = first + (kFeaturesFirst ? row : col) < x.features && (kFeaturesFirst ? col : row) < columns;
      if (touches) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int32_t feature = first + (kFeaturesFirst ? row : col + e);
          const int32_t column = kFeaturesFirst ? col + e : row;
          if (feature < x.features && column < columns) piece.lane[e] = x.data[feature * x.stride_f + offsets[column]];
        }
      }
      *reinterpret_cast<Vector<uint16_t, 8>*>(tile + tile_offset<kWidth>(row, col)) = piece;
    });
  }

 private:
  static constexpr int kPieces = kElements / 8;

  // Calls f(row, col) for this thread's 8-element pieces; neighbouring threads take neighbouring pieces.
  template <int kUnroll, typename F>
  static __device__ __forceinline__ void each_piece(int32_t thread_idx, F&& f) {
    constexpr int kRowPieces = kWidth / 8;
#pragma unroll kUnroll
    for (int i = 0; i < kPieces; i += kThreads) {
      const int32_t piece = i + thread_idx;
      if (kPieces % kThreads == 0 || piece < kPieces) f(piece / kRowPieces, piece % kRowPieces * 8);
    }
  }
};

}  // namespace csb::cuda
