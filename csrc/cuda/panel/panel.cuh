#pragma once

#include "csb/panel.h"
#include "cuda/device/numeric.cuh"

namespace csb::cuda {

constexpr int kPanelThreads = 128;

// Elements of W that a thread block holds in shared memory.
constexpr int kPanelTile = 4096;

// Entries that a thread reads at once: every block begins at a multiple of them.
constexpr int kPanelRun = 8;

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
template <typename Bits, typename Move>
__device__ __forceinline__ void for_each_piece(const PanelProblem& problem, const PanelTile& tile, int64_t row,
                                               int64_t col, int32_t slice, Bits* shared, Move&& move) {
  constexpr int kPiece = 16 / sizeof(Bits);
  const int32_t shift = problem.w.block_shift;
  const int32_t pieces_per_row = tile.columns / kPiece;
  const int64_t rows = problem.rows();
  const int64_t columns = problem.columns();
  Bits* panel = static_cast<Bits*>(problem.panel);
  for (int32_t piece = threadIdx.x; piece < tile.rows * pieces_per_row; piece += kPanelThreads) {
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
template <typename Bits>
__global__ void __launch_bounds__(kPanelThreads) unpack_panel_kernel(const __grid_constant__ PanelProblem problem) {
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

  // Phase 1: the first run of entries of every thread, on its way while the tile is cleared.
  const int32_t threads = kPanelThreads / tile.blocks;
  const int32_t block = threadIdx.x / threads;
  const int32_t block_col = tile_col * tile.blocks + block;
  int64_t entry = 0;
  int64_t end = 0;
  if (block_col < problem.block_cols) {
    const int32_t number = (problem.block_row + strip / tile.slices) * problem.w.kb + problem.block_col + block_col;
    entry = int64_t(problem.w.begin(number)) + (threadIdx.x - block * threads) * kPanelRun;
    end = problem.w.end(number);
  }
  // The last run of a block may reach into its padding, which is there to be read.
  Codes codes;
  Piece values[kPieces];
  const auto load = [&] {
    codes = *reinterpret_cast<const Codes*>(problem.w.codes + entry);
    const Piece* from = reinterpret_cast<const Piece*>(static_cast<const Bits*>(problem.values) + entry);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) values[i] = from[i];
  };
  bool more = entry < end;
  if (more) load();
  const int32_t pieces = (tile.rows * tile.columns) * static_cast<int32_t>(sizeof(Bits)) / 16;
  for (int32_t piece = threadIdx.x; piece < pieces; piece += kPanelThreads) memory[piece] = Piece{};
  __syncthreads();

  // Phase 2: entries to their places.
  Bits* own = shared + (block << (2 * shift));
  const int32_t first = slice * kPanelTile;
  while (more) {
    const Bits* value = reinterpret_cast<const Bits*>(values);
#pragma unroll
    for (int i = 0; i < kPanelRun; ++i) {
      const int32_t code = codes.lane[i];
      const bool here = tile.slices == 1 || (code >= first && code < first + kPanelTile);
      if (entry + i < end && here) own[code - first] = value[i];
    }
    entry += threads * kPanelRun;
    more = entry < end;
    if (more) load();
  }
  __syncthreads();

  // Phase 3: whole rows of the tile to the panel. What lies between columns() and ld is zero too.
  const int64_t row = (int64_t(strip / tile.slices) << shift) + slice * tile.rows;
  for_each_piece<Bits>(problem, tile, row, int64_t(tile_col) * tile.columns, slice, shared,
                       [](Bits* to, const Bits* from, int32_t) {
                         *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
                       });
}

// Grid: x = tile of the panel, row by row.
//
// Of blocks wider than a tile the entries are divided among the slices, not the rows, and read the
// panel where it lies.
template <typename Bits>
__global__ void __launch_bounds__(kPanelThreads) sample_panel_kernel(const __grid_constant__ PanelProblem problem) {
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

  // Phase 1: the first codes of every thread, on their way while the tile is read.
  const int32_t threads = kPanelThreads / tile.blocks;
  const int32_t block = threadIdx.x / threads;
  const int32_t block_col = tile_col * tile.blocks + block;
  int64_t entry = 0;
  int64_t end = 0;
  int64_t stop = 0;  // with padding
  if (block_col < problem.block_cols) {
    const int32_t number = (problem.block_row + strip / tile.slices) * problem.w.kb + problem.block_col + block_col;
    entry = int64_t(problem.w.begin(number)) +
            ((threadIdx.x - block * threads) + int64_t(slice) * kPanelThreads) * kPanelRun;
    end = problem.w.end(number);
    stop = problem.w.begin(number + 1);
  }
  Codes codes;
  const auto load = [&] { codes = *reinterpret_cast<const Codes*>(problem.w.codes + entry); };
  bool more = entry < stop;
  if (more) load();

  // Phase 2: the tile, swizzled as the codes are.
  if (tile.slices == 1) {
    for_each_piece<Bits>(problem, tile, row, int64_t(tile_col) * tile.columns, 0, shared,
                         [](const Bits* from, Bits* to, int32_t count) {
                           if (count == 16 / sizeof(Bits)) {
                             *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
                           } else {  // the product wrote nothing behind the last column
                             for (int32_t i = 0; i < count; ++i) to[i] = from[i];
                           }
                         });
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
        value[i] = tile.slices == 1 ? own[code] : origin[code_row(code, shift) * problem.ld + code_col(code, shift)];
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
