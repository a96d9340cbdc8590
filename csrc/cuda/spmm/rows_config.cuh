#pragma once

#include "csb/integer.h"
#include "cuda/device/numeric.cuh"

namespace csb::cuda {

// A thread block of the rows kernel computes 64 * kStrips output features x kTileN columns. A consumer warp holds kRows
// of the features, a lane of it kCols columns of each, in registers; producer warps keep a ring of stages filled.
template <typename T_, int kStrips_, int kCols_, int kRows_, int kProducers_, int kStages_, int kCapacity_,
          int kBatch_, int kMinBlocks_>
struct RowsConfig {
  using T = T_;
  static constexpr int kBlock = 64;             // features of a block of W, on either side
  static constexpr int kStrips = kStrips_;      // output strips that share a stage's X
  static constexpr int kCols = kCols_;          // columns of a lane
  static constexpr int kRows = kRows_;          // output features of a warp
  static constexpr int kProducers = kProducers_;
  static constexpr int kStages = kStages_;
  static constexpr int kCapacity = kCapacity_;  // entries of a strip in a stage
  static constexpr int kMinBlocks = kMinBlocks_;

  static constexpr int kTileN = 32 * kCols;
  static constexpr int kWarpsPerStrip = kBlock / kRows;
  static constexpr int kConsumers = kStrips * kWarpsPerStrip;
  static constexpr int kProducerThreads = 32 * kProducers;
  static constexpr int kThreads = 32 * (kConsumers + kProducers);
  // A column of X is a row of the stage. Its odd pitch serves lanes that store neighbouring features, lanes that store
  // neighbouring columns and lanes that read neighbouring columns alike: no two meet in a bank.
  static constexpr int kPitch = kBlock + 1;
  static constexpr int kRun = 4;                       // neighbouring entries that a producer reads at once
  static constexpr int kPass = kRun * kProducerThreads;  // entries that the producers read at once
  static constexpr int kItemsPerWarp = kBlock * kTileN / 128 / kProducers;  // of X, four elements for every lane
  static constexpr int kBatch = min_of(kItemsPerWarp, kBatch_);             // of them, on their way at a time

  static_assert(kItemsPerWarp % kBatch == 0 && kItemsPerWarp * kProducers * 128 == kBlock * kTileN,
                "the producers cover X in whole batches");
  static_assert(kBlock % kRows == 0, "a warp's rows lie in one strip");
  static_assert(kRows == 4 || kRows == 8 || kRows == 16, "a warp reads at once where its rows begin");
  static_assert(kCapacity % kRun == 0 && kCapacity < 65536, "a run of entries stays in one window, a place in 16 bits");
  static_assert(kThreads <= 1024 && kStages >= 2, "a stage is filled while another one is used");
};

// How the lanes of a producer warp read X.
enum class RowsAccess : int32_t {
  kFeatureVectors,  // aligned vectors of features: features last, columns equally far apart
  kColumnVectors,   // aligned vectors of columns: features first
  kElements,        // anything else
};

// What an entry multiplies, and where X's feature stands in a column of the stage, in bytes.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) RowsEntry {
  Acc value;
  int32_t offset;
};

enum class RowsStep : int32_t { kMultiply, kFlush, kEnd };

template <typename Config>
struct alignas(16) RowsStage {
  using Acc = AccOf<typename Config::T>;
  alignas(16) RowsEntry<Acc> entries[Config::kStrips][Config::kCapacity];  // by output feature
  alignas(16) uint16_t begin[Config::kStrips][Config::kBlock + 8];  // of each output feature's entries; [64]: the end
  Acc x[Config::kTileN * Config::kPitch];
  RowsStep step;
  int32_t strip;  // of kFlush, and its first column
  int64_t first_column;
};

template <typename Config>
struct alignas(16) RowsShared {
  RowsStage<Config> stages[Config::kStages];
  uint64_t full[Config::kStages];
  uint64_t empty[Config::kStages];
  // For the transposed product: bit `in` of masks[.][strip][2 * out ...] says that the entry is there. Two of them, so
  // that one is cleared while the other one is used.
  uint32_t masks[2][Config::kStrips][2 * Config::kBlock];
  int32_t starts[Config::kStrips][Config::kBlock];
  int64_t x_offsets[Config::kTileN];
};

}  // namespace csb::cuda
