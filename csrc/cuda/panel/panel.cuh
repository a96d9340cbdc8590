#pragma once

#include "csb/panel.h"
#include "cuda/device/numeric.cuh"

namespace csb::cuda {

constexpr int kPanelThreads = 64;

// Entries that a thread reads at once, and how often before it waits for them.
constexpr int kUnpackRun = 4;
constexpr int kUnpackRuns = 2;
constexpr int kSampleRun = 2;
constexpr int kSampleRuns = 4;

// Where a thread block works: a tile of at most 4096 elements of the panel. It is 64 columns of one
// block row, so several blocks side by side where they are narrower; of wider blocks some rows.
//
//   block_size 16        32            64        128                256
//   ┌──┬──┬──┬──┐   ┌─────┬─────┐   ┌──────┐   ┌────────────┐   ┌────────────────────────┐
//   └──┴──┴──┴──┘   └─────┴─────┘   │      │   └────────────┘   └────────────────────────┘
//                                   └──────┘      32 of 128        16 of 256 rows
//
// In shared memory a block stands as its codes say: swizzled, row by row.
template <int kBlockShift>
struct PanelTile {
  static_assert(kBlockShift >= 4 && kBlockShift <= 8, "16-byte pieces of a swizzled row need 16 elements a block");
  static constexpr int kBlocks = kBlockShift < 6 ? 64 >> kBlockShift : 1;  // side by side
  static constexpr int kRows = kBlockShift > 6 ? 4096 >> kBlockShift : 1 << kBlockShift;
  static constexpr int kSlices = (1 << kBlockShift) / kRows;  // of a block row
  static constexpr int kCols = kBlocks << kBlockShift;
  static constexpr int kElements = kRows * kCols;
  static constexpr int kThreadsPerBlock = kPanelThreads / kBlocks;

  int32_t block_row;  // in the panel
  int32_t block_col;  // of this thread's block, in the panel
  int32_t slice;
  int32_t block;  // of the tile, this thread's
  int32_t row;    // of the panel
  int32_t col;
  int32_t number;  // this thread's block of W, -1 where the panel has none
  int32_t thread;  // this one among those of its block

  __device__ __forceinline__ explicit PanelTile(const PanelProblem& problem) {
    const int32_t across = ceil_div(problem.block_cols, kBlocks);
    const int32_t strip = blockIdx.x / across;
    const int32_t tile_col = blockIdx.x - strip * across;
    block_row = strip / kSlices;
    slice = strip % kSlices;
    block = threadIdx.x / kThreadsPerBlock;
    block_col = tile_col * kBlocks + block;
    row = (block_row << kBlockShift) + slice * kRows;
    col = tile_col * kCols;
    number = block_col < problem.block_cols
                 ? (problem.block_row + block_row) * problem.w.kb + problem.block_col + block_col
                 : -1;
    thread = threadIdx.x % kThreadsPerBlock;
  }

  // Calls move(panel address, shared-memory address) for every 16-byte piece of the tile that lies in
  // the panel.
  template <typename Bits, typename Move>
  __device__ __forceinline__ void for_each_piece(const PanelProblem& problem, Bits* shared, Move&& move) const {
    constexpr int kPiece = 16 / sizeof(Bits);
    constexpr int kPiecesPerRow = kCols / kPiece;
    constexpr int kPieces = kRows * kPiecesPerRow;
    const int32_t rows = static_cast<int32_t>(min_of<int64_t>(problem.rows() - row, kRows));
    const int32_t cols = static_cast<int32_t>(min_of<int64_t>(problem.columns() - col, kCols));
    Bits* origin = static_cast<Bits*>(problem.panel) + row * problem.ld + col;
#pragma unroll
    for (int step = 0; step < ceil_div(kPieces, kPanelThreads); ++step) {
      const int32_t piece = step * kPanelThreads + threadIdx.x;
      const int32_t piece_row = piece / kPiecesPerRow;
      const int32_t piece_col = piece % kPiecesPerRow * kPiece;
      if (piece_row >= rows || piece_col >= cols) continue;
      const int32_t code = encode(piece_row, piece_col & ((1 << kBlockShift) - 1), kBlockShift);
      move(origin + piece_row * problem.ld + piece_col,
           shared + (piece_col >> kBlockShift << (2 * kBlockShift)) + code);
    }
  }
};

// What a thread reads at once: neighbouring entries, so that a warp's entries lie in few rows of the
// tile and few banks meet, and several such runs on their way.
template <typename Bits, int kRun>
struct EntryRun {
  static_assert(8 % kRun == 0, "every block begins at a multiple of 8 entries");
  Vector<uint16_t, kRun> codes;
  Vector<Bits, kRun> values;
};

// Grid: x = tile of the panel, row by row.
template <typename Bits, int kBlockShift, int kRun = kUnpackRun, int kRuns = kUnpackRuns>
__global__ void __launch_bounds__(kPanelThreads) unpack_panel_kernel(const __grid_constant__ PanelProblem problem) {
  using Tile = PanelTile<kBlockShift>;
  using Piece = Vector<uint32_t, 4>;
  using Run = EntryRun<Bits, kRun>;
  constexpr int kTilePieces = Tile::kElements * static_cast<int>(sizeof(Bits)) / 16;
  constexpr uint32_t kStep = Tile::kThreadsPerBlock * kRun;
  __shared__ Piece memory[kTilePieces];
  Bits* shared = reinterpret_cast<Bits*>(memory);
  const Tile tile(problem);

  // Phase 1: the first entries of every thread, on their way while the tile is cleared. The last run of
  // a block may reach into its padding, which is there to be read.
  uint32_t entry = 0;
  uint32_t end = 0;
  if (tile.number >= 0) {
    entry = problem.w.begin(tile.number) + tile.thread * kRun;
    end = problem.w.end(tile.number);
  }
  Run runs[kRuns];
  const auto load = [&] {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint32_t at = entry + run * kStep;
      if (at >= end) break;
      runs[run].codes = *reinterpret_cast<const decltype(Run::codes)*>(problem.w.codes + at);
      runs[run].values = *reinterpret_cast<const decltype(Run::values)*>(static_cast<const Bits*>(problem.values) + at);
    }
  };
  load();
#pragma unroll
  for (int piece = threadIdx.x; piece < kTilePieces; piece += kPanelThreads) memory[piece] = Piece{};
  __syncthreads();

  // Phase 2: entries to their places.
  Bits* own = shared + (tile.block << (2 * kBlockShift));
  const uint32_t first = tile.slice * Tile::kElements;
  while (entry < end) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        uint32_t code = runs[run].codes.lane[i];
        bool here = entry + run * kStep + i < end;
        if constexpr (Tile::kSlices > 1) {
          code -= first;
          here = here && code < Tile::kElements;
        }
        if (here) own[code] = runs[run].values.lane[i];
      }
    }
    entry += kRuns * kStep;
    load();
  }
  __syncthreads();

  // Phase 3: whole rows of the tile to the panel. What lies between columns() and ld is zero too.
  tile.for_each_piece(problem, shared, [](Bits* to, const Bits* from) {
    *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
  });
}

// Grid: x = tile of the panel, row by row; of blocks wider than a tile the entries are divided among
// the slices, not their rows.
//
// The panel was written a moment ago and lies in the L2 cache: copying tiles of it to shared memory
// first was slower at every density.
template <typename Bits, int kBlockShift, int kRun = kSampleRun, int kRuns = kSampleRuns>
__global__ void __launch_bounds__(kPanelThreads) sample_panel_kernel(const __grid_constant__ PanelProblem problem) {
  using Tile = PanelTile<kBlockShift>;
  using Run = EntryRun<Bits, kRun>;
  constexpr uint32_t kStep = Tile::kThreadsPerBlock * Tile::kSlices * kRun;
  const Tile tile(problem);
  if (tile.number < 0) return;
  uint32_t entry = problem.w.begin(tile.number) + (tile.thread + tile.slice * Tile::kThreadsPerBlock) * kRun;
  const uint32_t end = problem.w.end(tile.number);
  const uint32_t stop = problem.w.begin(tile.number + 1);  // with padding
  const Bits* origin = static_cast<const Bits*>(problem.panel) + (int64_t(tile.block_row) << kBlockShift) * problem.ld +
                       (tile.block_col << kBlockShift);
  const int32_t ld = static_cast<int32_t>(problem.ld);
  for (; entry < stop; entry += kRuns * kStep) {
    Run runs[kRuns];
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint32_t at = entry + run * kStep;
      if (at >= stop) break;
      runs[run].codes = *reinterpret_cast<const decltype(Run::codes)*>(problem.w.codes + at);
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int32_t code = runs[run].codes.lane[i];
        runs[run].values.lane[i] = 0;
        if (entry + run * kStep + i < end) {
          runs[run].values.lane[i] = origin[code_row(code, kBlockShift) * ld + code_col(code, kBlockShift)];
        }
      }
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint32_t at = entry + run * kStep;
      if (at >= stop) break;
      *reinterpret_cast<decltype(Run::values)*>(static_cast<Bits*>(problem.values) + at) = runs[run].values;
    }
  }
}

}  // namespace csb::cuda
