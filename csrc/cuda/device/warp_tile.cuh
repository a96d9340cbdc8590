#pragma once

#include "cuda/device/mma.cuh"

namespace csb::cuda {

// Element offset in a shared-memory tile of kWidth 16-bit elements a row. 8-element groups are
// xor-ed by the row so that the 8 rows of an ldmatrix, one group each, lie in 8 different 16-byte bank
// groups. With kWidth 64 it equals csb::encode(row, col, 6): a code is such an offset.
template <int kWidth>
__device__ __forceinline__ constexpr int32_t tile_offset(int32_t row, int32_t col) {
  static_assert(kWidth == 8 || kWidth == 32 || kWidth % 64 == 0,
                "the swizzle of a row of kWidth elements is not known");
  if constexpr (kWidth == 8) {
    return row * kWidth + col;
  } else if constexpr (kWidth == 32) {
    return row * kWidth + (col ^ (((row >> 1) & 3) << 3));
  } else {
    return row * kWidth + (col ^ ((row & 7) << 3));
  }
}

// The kM x kN float sums of one warp, in mma fragments.
template <typename Scalar, int kM, int kN>
struct WarpTile {
  static_assert(kM % 16 == 0, "a warp computes whole 16-row fragments");
  static_assert(kN == 8 || kN % 16 == 0, "one ldmatrix fetches 8 or 16 columns");
  static constexpr int kRowTiles = kM / 16;
  static constexpr int kColTiles = kN / 8;

  float sum[kRowTiles][kColTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
  }

  // sum += A[row ..., 64] . B[64, col ...]. The shared-memory tile a is A, 64 wide, or its transpose
  // with kATransposed; b is B's transpose [column][64], or B itself, kBWidth wide, with kBRowMajor.
  template <bool kATransposed, bool kBRowMajor, int kBWidth>
  __device__ __forceinline__ void multiply(const uint16_t* a, const uint16_t* b, int32_t row, int32_t col,
                                           int32_t lane_idx) {
    const int32_t r = lane_idx & 7;
    const int32_t low = lane_idx & 8;           // second matrix of a pair
    const int32_t high = (lane_idx & 16) >> 1;  // second pair
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      uint32_t a_frag[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int32_t offset = kATransposed ? tile_offset<64>(k + high + r, row + 16 * i + low)
                                            : tile_offset<64>(row + 16 * i + low + r, k + high);
        load_matrices<kATransposed>(a_frag[i], a + offset);
      }
      if constexpr (kN == 8) {
        uint32_t b_frag[2];
        load_matrices<kBRowMajor>(b_frag, b + b_offset<kBRowMajor, kBWidth>(k + low, col, r));
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) multiply_add<Scalar>(sum[i][0], a_frag[i], b_frag[0], b_frag[1]);
      } else {
#pragma unroll
        for (int j = 0; j < kColTiles; j += 2) {
          uint32_t b_frag[4];
          load_matrices<kBRowMajor>(b_frag, b + b_offset<kBRowMajor, kBWidth>(k + low, col + 8 * j + high, r));
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            multiply_add<Scalar>(sum[i][j], a_frag[i], b_frag[0], b_frag[1]);
            multiply_add<Scalar>(sum[i][j + 1], a_frag[i], b_frag[2], b_frag[3]);
          }
        }
      }
    }
  }

 private:
  // Where row r of the 8x8 matrix at (k, n) of B starts.
  template <bool kBRowMajor, int kBWidth>
  static __device__ __forceinline__ int32_t b_offset(int32_t k, int32_t n, int32_t r) {
    return kBRowMajor ? tile_offset<kBWidth>(k + r, n) : tile_offset<64>(n + r, k);
  }
};

}  // namespace csb::cuda
