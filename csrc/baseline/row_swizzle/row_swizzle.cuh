#pragma once

#include <cstring>
#include <type_traits>

#include "baseline/csr.h"
#include "csb/integer.h"
#include "cuda/device/numeric.cuh"

namespace csb::baseline {

using cuda::AccOf;
using cuda::from_acc;
using cuda::to_acc;
using cuda::Vector;

constexpr int kWarpThreads = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kAccessBytes = 16;
constexpr int32_t kNoRow = -1;

// A sub-warp of kLanes threads owns one row and kColumns columns, a thread kLoads vectors of kVec neighbouring columns.
template <int kLanes_, int kVec_, int kLoads_, int kUnroll_, int kThreads_, int kMinBlocks_>
struct RowSwizzleConfig {
  static constexpr int kLanes = kLanes_;
  static constexpr int kVec = kVec_;
  static constexpr int kLoads = kLoads_;
  static constexpr int kUnroll = kUnroll_;  // entries whose reads of X are in flight together
  static constexpr int kThreads = kThreads_;
  static constexpr int kMinBlocks = kMinBlocks_;

  static constexpr int kRows = kThreads / kLanes;
  static constexpr int kColumns = kLanes * kVec * kLoads;
  static constexpr int kRun = kAccessBytes / sizeof(int32_t);  // entries that a thread stages at once
  static constexpr int kStage = kLanes * kRun;

  static_assert(kLanes >= 8 && kWarpThreads % kLanes == 0, "a warp holds whole sub-warps");
  static_assert(kThreads % kWarpThreads == 0, "a thread block holds whole warps");
  static_assert(kUnroll % kRun == 0 && kStage % kUnroll == 0, "a stage is cut into whole aligned groups");
};

// What one access moves. X waits for its use in this form, because 16-bit elements would take a register each.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
template <int kBytes>
using Word = typename WordOf<kBytes>::type;

template <typename T, int kVec>
__device__ __forceinline__ void unpack(const Word<sizeof(T) * kVec>& word, AccOf<T> (&x)[kVec]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kVec % 2 == 0) {  // the compiler takes two steps for an upper half
    unsigned pairs[kVec / 2];
    memcpy(pairs, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      x[i] = __uint_as_float(pairs[i / 2] << 16);
      x[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000u);
    }
  } else {
    Vector<T, kVec> elements;
    memcpy(&elements, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = to_acc(elements.lane[i]);
  }
}

template <typename T, int kCount>
constexpr int kPiece = min_of<int>(kCount, kAccessBytes / sizeof(T));

// Reads kCount neighbours past L1, which X needs for itself.
template <int kCount, typename T>
__device__ __forceinline__ void read_run(T* to, const T* from) {
  using Piece = Word<sizeof(T) * kPiece<T, kCount>>;
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece<T, kCount>) {
    const Piece piece = __ldcg(reinterpret_cast<const Piece*>(from + i));
    memcpy(to + i, &piece, sizeof(piece));
  }
}

// Between registers and shared memory.
template <int kCount, typename T>
__device__ __forceinline__ void copy_run(T* to, const T* from) {
  using Piece = Vector<T, kPiece<T, kCount>>;
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece<T, kCount>) {
    *reinterpret_cast<Piece*>(to + i) = *reinterpret_cast<const Piece*>(from + i);
  }
}

// Entries on their way from device memory to shared memory.
template <typename T, int kCount>
struct alignas(kAccessBytes) EntryRun {
  int32_t col[kCount];
  T value[kCount];
};

// A row's share of shared memory. The padding puts what the rows of a warp read at one time into different banks.
template <typename Acc, int kStage>
struct alignas(kAccessBytes) StagedRow {
  int32_t col[kStage];
  Acc value[kStage];
  char padding[kAccessBytes];
};

template <typename T>
struct RowSwizzleParams {
  CsrView w;
  const T* values;
  bool aligned;  // every fourth entry of col_ind and values stands at a boundary of one access
  const T* x;
  T* y;
  uint32_t n;
  uint32_t x_pitch;  // bytes of a row of X
};

// Grid: x = block of kRows rows in row_order, (z, y) = panel of kColumns columns. x runs fastest, so that the thread
// blocks of one time share a panel of X in L2, and what runs on one multiprocessor shares its rows in L1.
//
// Positions count from the last aligned entry at or before the row's first one. The row owns [lead, end):
//
//   col_ind, values   ... f f | f f r r | r r r r | r r r f | ...      f: of other rows, r: of this row
//   position                    0   lead                 end
template <typename T, typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    row_swizzle_kernel(const __grid_constant__ RowSwizzleParams<T> p) {
  using Acc = AccOf<T>;
  constexpr int kLanes = Config::kLanes, kVec = Config::kVec, kLoads = Config::kLoads, kUnroll = Config::kUnroll;
  constexpr int kRun = Config::kRun, kStage = Config::kStage;
  using XWord = Word<sizeof(T) * kVec>;
  __shared__ StagedRow<Acc, kStage> shared[Config::kRows];

  // Find the row. Threads without one keep an empty one, because the warp's barriers need them.
  const int row_in_block = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  StagedRow<Acc, kStage>& staged = shared[row_in_block];
  const uint32_t slot = blockIdx.x * Config::kRows + row_in_block;
  const int32_t row = slot < static_cast<uint32_t>(p.w.m) ? p.w.row_order[slot] : kNoRow;
  const uint32_t row_begin = row == kNoRow ? 0 : p.w.row_ptr[row];
  const uint32_t lead = row_begin % kRun;
  const uint32_t first = row_begin - lead;
  const uint32_t end = row == kNoRow ? 0 : p.w.row_ptr[row + 1] - first;

  // Find the columns. Those past the last one read column 0 instead, which costs less than a predicate on every read.
  const uint32_t panel = blockIdx.z * gridDim.y + blockIdx.y;
  const uint32_t first_column = panel * Config::kColumns + lane * kVec;
  const char* x[kLoads];
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    const uint32_t column = first_column + l * kLanes * kVec;
    x[l] = reinterpret_cast<const char*>(p.x + (column < p.n ? column : 0));
    asm volatile("" : "+l"(x[l]));  // else the compiler works it out again, from blockIdx, before every group
  }

  const auto read_entries = [&](uint32_t position) {
    EntryRun<T, kRun> run = {};
    if (position >= end) return run;
    const int32_t* col_ind = p.w.col_ind + first + position;
    const T* values = p.values + first + position;
    if (p.aligned && first + position + kRun <= static_cast<uint32_t>(p.w.nnz)) {
      read_run<kRun>(run.col, col_ind);
      read_run<kRun>(run.value, values);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (position + i < lead || position + i >= end) continue;
        run.col[i] = col_ind[i];
        run.value[i] = values[i];
      }
    }
    return run;
  };

  Acc acc[kLoads][kVec] = {};
  const auto accumulate = [&](int at, auto belongs) {
    int32_t col[kUnroll];
    Acc value[kUnroll];
    copy_run<kUnroll>(col, &staged.col[at]);
    copy_run<kUnroll>(value, &staged.value[at]);
    XWord word[kUnroll][kLoads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!belongs(u)) continue;
      const uint64_t offset = static_cast<uint64_t>(static_cast<uint32_t>(col[u])) * p.x_pitch;
#pragma unroll
      for (int l = 0; l < kLoads; ++l) word[u][l] = __ldg(reinterpret_cast<const XWord*>(x[l] + offset));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (!belongs(u)) continue;  // a zero in place of a foreign value would turn its infinite X into NaN
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        Acc x_run[kVec];
        unpack<T, kVec>(word[u][l], x_run);
#pragma unroll
        for (int v = 0; v < kVec; ++v) acc[l][v] += value[u] * x_run[v];
      }
    }
  };

  // Groups within [full_begin, full_end) belong to every row of the warp and need no predicates. The bounds are those
  // of the warp, so that its rows never part.
  const uint32_t warp_end = __reduce_max_sync(kFullWarp, end);
  const uint32_t full_begin = __reduce_max_sync(kFullWarp, lead) == 0 ? 0 : kUnroll;
  const uint32_t full_end = __reduce_min_sync(kFullWarp, end);

  EntryRun<T, kRun> next = read_entries(lane * kRun);
  for (uint32_t base = 0; base < warp_end; base += kStage) {
    // Stage the entries that were read ahead, and read ahead.
    Acc value[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) value[i] = to_acc(next.value[i]);
    __syncwarp();  // the previous stage has been used up
    copy_run<kRun>(&staged.col[lane * kRun], next.col);
    copy_run<kRun>(&staged.value[lane * kRun], value);
    __syncwarp();
    next = read_entries(base + kStage + lane * kRun);

    // Multiply.
    const int stage_end = min_of<uint32_t>(kStage, warp_end - base);
    for (int at = 0; at < stage_end; at += kUnroll) {
      const uint32_t position = base + at;
      if (position >= full_begin && position + kUnroll <= full_end) {
        accumulate(at, [](int) { return true; });
      } else {
        accumulate(at, [&](int u) { return position + u >= lead && position + u < end; });
      }
    }
  }

  // Store.
  if (row == kNoRow) return;
  T* y = p.y + row * static_cast<int64_t>(p.n);
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    const uint32_t column = first_column + l * kLanes * kVec;
    if (column >= p.n) continue;
    Vector<T, kVec> y_run;
#pragma unroll
    for (int v = 0; v < kVec; ++v) y_run.lane[v] = from_acc<T>(acc[l][v]);
    *reinterpret_cast<Vector<T, kVec>*>(y + column) = y_run;
  }
}

}  // namespace csb::baseline
