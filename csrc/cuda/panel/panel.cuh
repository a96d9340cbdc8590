#pragma once

#include "csb/panel.h"
#include "cuda/device/mma.cuh"
#include "cuda/device/numeric.cuh"

namespace csb::cuda {

constexpr int kPanelThreads = 128;

// Elements of W that a thread block holds in shared memory.
constexpr int kPanelTile = 4096;

// Entries that a thread reads at once: every block begins at a multiple of them.
constexpr int kPanelRun = 8;

// Runs of a thread on their way at once: a half-full tile is read in one go.
constexpr int kUnpackRuns = 2;

// Below this a tile's entries touch too little of it to copy it all.
constexpr int kFewEntries = kPanelTile / 32;

// Where a thread block works. A tile is kPanelTile elements of the panel: 64 columns of one block
// row, so several blocks side by side where they are narrower; of wider blocks some rows.
//
//   block_size 16        32            64        128                256
//   ┌──┬──┬──┬──┐   ┌─────┬─────┐   ┌──────┐   ┌────────────┐   ┌────────────────────────┐
//   └──┴──┴──┴──┘   └─────┴─────┘   │      │   └────────────┘   └────────────────────────┘
//                                   └──────┘      32 of 128        16 of 256 rows
//
// In shared memory a block's tile stands as its codes say: swizzled, row by row.
struct PanelTile {
  int32_t blocks;  // side by side
  int32_t rows;
  int32_t slices;  // of a block row
  int32_t columns;

  CSB_HOST_DEVICE explicit PanelTile(int32_t block_shift)
      : blocks(block_shift < 6 ? 64 >> block_shift : 1),
        rows(block_shift > 6 ? kPanelTile >> block_shift : 1 << block_shift),
        slices((1 << block_shift) / rows),
        columns(blocks << block_shift) {}

  CSB_HOST_DEVICE int64_t across(const PanelProblem& problem) const { return ceil_div(problem.block_cols, blocks); }
  CSB_HOST_DEVICE int64_t tiles(const PanelProblem& problem) const {
    return across(problem) * problem.block_rows * slices;
  }
};

// Calls move(panel address, shared-memory address, count) for every 16-byte piece of the tile at
// (row, col) of the panel that lies in it. `count` is how many of its elements are W's.
template <typename Bits, int kThreads, typename Move>
__device__ __forceinline__ void for_each_piece(const PanelProblem& problem, const PanelTile& tile, int64_t row,
                                               int64_t col, int32_t slice, Bits* shared, Move&& move) {
  constexpr int kPiece = 16 / sizeof(Bits);
  const int32_t shift = problem.w.block_shift;
  const int32_t pieces_per_row = tile.columns / kPiece;
  const int64_t rows = problem.rows();
  const int64_t columns = problem.columns();
  Bits* panel = static_cast<Bits*>(problem.panel);
  for (int32_t piece = threadIdx.x; piece < tile.rows * pieces_per_row; piece += kThreads) {
    const int32_t piece_row = piece / pieces_per_row;
    const int32_t piece_col = (piece - piece_row * pieces_per_row) * kPiece;
    if (row + piece_row >= rows || col + piece_col >= columns) continue;
    const int32_t block = piece_col >> shift;
    const int32_t code = encode(slice * tile.rows + piece_row, piece_col & ((1 << shift) - 1), shift);
    move(panel + (row + piece_row) * problem.ld + col + piece_col,
         shared + (block << (2 * shift)) + code - slice * kPanelTile,
         static_cast<int32_t>(min_of<int64_t>(kPiece, columns - col - piece_col)));
  }
}

// Grid: x = tile of the panel, row by row.
template <typename Bits, int kThreads, int kRuns>
__global__ void __launch_bounds__(kThreads) unpack_panel_kernel(const __grid_constant__ PanelProblem problem) {
  using Piece = Vector<uint32_t, 4>;
  using Codes = Vector<uint16_t, kPanelRun>;
  constexpr int kPieces = sizeof(Bits) * kPanelRun / 16;
  __shared__ Piece memory[kPanelTile * sizeof(Bits) / 16];
  Bits* shared = reinterpret_cast<Bits*>(memory);
  const PanelTile tile(problem.w.block_shift);
  const int32_t across = static_cast<int32_t>(tile.across(problem));
  const int32_t strip = blockIdx.x / across;
  const int32_t tile_col = blockIdx.x - strip * across;
  const int32_t slice = strip % tile.slices;
  const int32_t shift = problem.w.block_shift;

  // Phase 1: the first runs of entries of every thread, on their way while the tile is cleared.
  const int32_t threads = kThreads / tile.blocks;
  const int32_t block = threadIdx.x / threads;
  const int32_t block_col = tile_col * tile.blocks + block;
  const int32_t step = threads * kPanelRun;
  int64_t entry = 0;
  int64_t end = 0;
  if (block_col < problem.block_cols) {
    const int32_t number = (problem.block_row + strip / tile.slices) * problem.w.kb + problem.block_col + block_col;
    entry = int64_t(problem.w.begin(number)) + (threadIdx.x - block * threads) * kPanelRun;
    end = problem.w.end(number);
  }
  // The last run of a block may reach into its padding, which is there to be read.
  Codes codes[kRuns];
  Piece values[kRuns][kPieces];
  const auto load = [&] {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t from = entry + run * step;
      if (from >= end) break;
      codes[run] = *reinterpret_cast<const Codes*>(problem.w.codes + from);
      const Piece* value = reinterpret_cast<const Piece*>(static_cast<const Bits*>(problem.values) + from);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) values[run][i] = value[i];
    }
  };
  load();
  const int32_t pieces = (tile.rows * tile.columns) * static_cast<int32_t>(sizeof(Bits)) / 16;
  for (int32_t piece = threadIdx.x; piece < pieces; piece += kThreads) memory[piece] = Piece{};
  __syncthreads();

  // Phase 2: entries to their places.
  Bits* own = shared + (block << (2 * shift));
  const int32_t first = slice * kPanelTile;
  while (entry < end) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const Bits* value = reinterpret_cast<const Bits*>(values[run]);
      const int64_t left = end - entry - run * step;
#pragma unroll
      for (int i = 0; i < kPanelRun; ++i) {
        const int32_t code = codes[run].lane[i];
        const bool here = tile.slices == 1 || (code >= first && code < first + kPanelTile);
        if (i < left && here) own[code - first] = value[i];
      }
    }
    entry += kRuns * step;
    load();
  }
  __syncthreads();

  // Phase 3: whole rows of the tile to the panel. What lies between columns() and ld is zero too.
  const int64_t row = (int64_t(strip / tile.slices) << shift) + slice * tile.rows;
  for_each_piece<Bits, kThreads>(problem, tile, row, int64_t(tile_col) * tile.columns, slice, shared,
                                 [](Bits* to, const Bits* from, int32_t) {
                                   *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
                                 });
}

// Grid: x = tile of the panel, row by row.
//
// A tile of many entries is copied to shared memory first, whole lines at a time. Few entries read
// the panel where it lies; so do blocks wider than a tile, whose entries are divided among the
// slices, not their rows.
template <typename Bits, int kThreads>
__global__ void __launch_bounds__(kThreads) sample_panel_kernel(const __grid_constant__ PanelProblem problem) {
  using Piece = Vector<uint32_t, 4>;
  using Codes = Vector<uint16_t, kPanelRun>;
  constexpr int kPieces = sizeof(Bits) * kPanelRun / 16;
  __shared__ Piece memory[kPanelTile * sizeof(Bits) / 16];
  Bits* shared = reinterpret_cast<Bits*>(memory);
  const PanelTile tile(problem.w.block_shift);
  const int32_t across = static_cast<int32_t>(tile.across(problem));
  const int32_t strip = blockIdx.x / across;
  const int32_t tile_col = blockIdx.x - strip * across;
  const int32_t slice = strip % tile.slices;
  const int32_t shift = problem.w.block_shift;
  const int64_t row = int64_t(strip / tile.slices) << shift;

  // Phase 1: the first codes of every thread, on their way while the tile is copied.
  const int32_t threads = kThreads / tile.blocks;
  const int32_t block = threadIdx.x / threads;
  const int32_t block_col = tile_col * tile.blocks + block;
  const int32_t first_number = (problem.block_row + strip / tile.slices) * problem.w.kb + problem.block_col;
  int64_t entry = 0;
  int64_t end = 0;
  int64_t stop = 0;  // with padding
  if (block_col < problem.block_cols) {
    const int32_t number = first_number + block_col;
    entry =
        int64_t(problem.w.begin(number)) + ((threadIdx.x - block * threads) + int64_t(slice) * kThreads) * kPanelRun;
    end = problem.w.end(number);
    stop = problem.w.begin(number + 1);
  }
  Codes codes;
  const auto load = [&] { codes = *reinterpret_cast<const Codes*>(problem.w.codes + entry); };
  bool more = entry < stop;
  if (more) load();

  // Phase 2: the tile, swizzled as the codes are.
  const int32_t last_col = min_of((tile_col + 1) * tile.blocks, problem.block_cols);
  const int32_t stored =
      problem.w.begin(first_number + last_col) - problem.w.begin(first_number + tile_col * tile.blocks);
  const bool copied = tile.slices == 1 && stored >= kFewEntries;
  if (copied) {
    for_each_piece<Bits, kThreads>(problem, tile, row, int64_t(tile_col) * tile.columns, 0, shared,
                                   [](const Bits* from, Bits* to, int32_t count) {
                                     if (count == 16 / sizeof(Bits)) {
                                       copy_async_16(to, from);
                                     } else {  // the product wrote nothing behind the last column
                                       for (int32_t i = 0; i < count; ++i) to[i] = from[i];
                                     }
                                   });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }

  // Phase 3: the entries.
  const Bits* own = shared + (block << (2 * shift));
  const Bits* origin = static_cast<const Bits*>(problem.panel) + row * problem.ld + (int64_t(block_col) << shift);
  while (more) {
    alignas(16) Bits value[kPanelRun];
#pragma unroll
    for (int i = 0; i < kPanelRun; ++i) {
      const int32_t code = codes.lane[i];
      value[i] = 0;
      if (entry + i < end) {
        value[i] = copied ? own[code] : origin[code_row(code, shift) * problem.ld + code_col(code, shift)];
      }
    }
    Piece* to = reinterpret_cast<Piece*>(static_cast<Bits*>(problem.values) + entry);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) to[i] = reinterpret_cast<const Piece*>(value)[i];
    entry += int64_t(threads) * tile.slices * kPanelRun;
    more = entry < stop;
    if (more) load();
  }
}

}  // namespace csb::cuda
