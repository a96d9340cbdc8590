#pragma once

#include "csb/integer.h"
#include "cuda/device/mbarrier.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/vector_access.cuh"

namespace csb::cuda {

// A thread block of the rows kernel computes 64 * kStrips output features x kTileN columns, with three kinds of warps:
// consumers hold the sums in registers, kRows features x kCols columns for every lane; loaders and sorters fill a ring
// of stages for them, with X and with the entries in the order of the output features.
template <typename T_, int kStrips_, int kCols_, int kRows_, int kSorters_, int kStages_, int kCapacity_, int kBatch_,
          int kMinBlocks_, bool kCluster_ = false>
struct RowsConfig {
  using T = T_;
  static constexpr bool kCluster = kCluster_;  // thread blocks share a strip's input and join their sums
  static constexpr int kBlock = 64;            // features of a block of W, on either side
  static constexpr int kStrips = kStrips_;     // output strips that share a stage's X
  static constexpr int kCols = kCols_;         // columns of a lane
  static constexpr int kRows = kRows_;         // output features of a warp
  static constexpr int kSorters = kSorters_;   // one for a strip, and as many of them as take turns
  static constexpr int kStages = kStages_;
  static constexpr int kCapacity = kCapacity_;  // entries of a strip in a stage
  static constexpr int kMinBlocks = kMinBlocks_;

  static constexpr int kTileN = 32 * kCols;
  static constexpr int kWarpsPerStrip = kBlock / kRows;
  static constexpr int kConsumers = kStrips * kWarpsPerStrip;
  static constexpr int kLoaders = 4;
  static constexpr int kTurns = kSorters / kStrips;  // a sorter takes every kTurns-th stage
  static constexpr int kThreads = 32 * (kConsumers + kLoaders + kSorters);
  // Each kind of warp has as many registers as it uses: the sums of a consumer, a loader's batch of X.
  static constexpr int kLaunchRegisters = 65536 / (kThreads * kMinBlocks) / 8 * 8;
  static constexpr int kConsumerRegisters = kCols == 8 ? 80 : 56;
  static constexpr int kSorterRegisters = 48;
  static constexpr int kLoaderRegisters =
      (kLaunchRegisters * (kThreads / 32) - kConsumerRegisters * kConsumers - kSorterRegisters * kSorters) / kLoaders;
  static_assert(kConsumers % 4 == 0 && kLoaders % 4 == 0 && kSorters % 4 == 0, "warps change registers by fours");
  // A column of X is a row of the stage. Its odd pitch serves lanes that store neighbouring features, lanes that store
  // neighbouring columns and lanes that read neighbouring columns alike: no two meet in a bank.
  static constexpr int kPitch = kBlock + 1;
  static constexpr int kItems = kBlock * kTileN / 128 / kLoaders;  // of X for a loader, four elements for every lane
  static constexpr int kBatch = min_of(kItems, kBatch_);           // of them, on their way at a time
  static constexpr int kRun = 4;                                   // neighbouring entries that a lane sorts at once
  static constexpr int kPass = 32 * kRun;

  static_assert(kItems % kBatch == 0 && kItems * kLoaders * 128 == kBlock * kTileN, "the loaders cover X in batches");
  static_assert(kSorters % kStrips == 0, "every strip has a sorter at every turn");
  static_assert(kBlock % kRows == 0, "a warp's rows lie in one strip");
  static_assert(kRows == 4 || kRows == 8 || kRows == 16, "a warp reads at once where its rows begin");
  static_assert(kCapacity % kRun == 0 && kCapacity < 65536, "a run of entries stays in one window, a place in 16 bits");
  static_assert(!kCluster || (kStrips == 1 && kCols <= 4), "the sums of a strip find room in a stage's X");
  static_assert(kThreads <= 1024 && kStages >= 2, "a stage is filled while another one is used");
};

// What an entry multiplies, and where X's feature stands in a column of the stage, in bytes.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) RowsEntry {
  Acc value;
  int32_t offset;
};

enum class RowsStepKind : int32_t { kMultiply, kFlush, kEnd };

template <typename Config>
struct alignas(16) RowsStage {
  using Acc = AccOf<typename Config::T>;
  alignas(16) RowsEntry<Acc> entries[Config::kStrips][Config::kCapacity];  // by output feature
  alignas(16) uint16_t begin[Config::kStrips][Config::kBlock + 8];  // of each output feature's entries; [64]: the end
  Acc x[Config::kTileN * Config::kPitch];
  RowsStepKind kind;
  int32_t strip;  // of kFlush, and its first column
  int64_t first_column;
};

template <typename Config>
struct alignas(16) RowsShared {
  RowsStage<Config> stages[Config::kStages];
  MBarrier full[Config::kStages];
  MBarrier empty[Config::kStages];
  MBarrier multiplied;  // with kCluster: by all consumers, who then find room for their sums
  // For the transposed product, of each sorter: bit `in` of masks[...][2 * out ...] says that the entry is there.
  alignas(16) uint32_t masks[Config::kSorters][2 * Config::kBlock];
  int32_t starts[Config::kSorters][Config::kBlock];
  int64_t x_offsets[Config::kTileN];
};

// What the launcher decides for every thread block of a launch.
struct RowsLaunch {
  int32_t tiles;           // of kTileN columns
  bool split;              // a thread block walks a unit, else kStrips strips
  int32_t cluster;         // with kCluster: thread blocks that share a strip, 2, 4 or 8
  bool lanes_on_features;  // without vectors: neighbouring lanes read neighbouring features, else columns
  bool vector_entries;     // codes and values can be read in vectors
  bool vector_output;      // 16 bytes of neighbouring features of Y are one aligned vector
};

}  // namespace csb::cuda
