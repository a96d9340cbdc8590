#pragma once

#include "cuda/device/panel.cuh"

namespace csb::cuda {

// Thread map of the gather kernel. A compute tile is 64 output features x kTileN columns:
//
//   thread = (row group * kSplits + split) * kLanes + lane
//
// kLanes lanes hold one vector of columns each, a row group holds kRows output features, and where
// threads are left over (few columns) kSplits of them share the entries of a row.
template <typename T, int kTileN_>
struct GatherConfig {
  using Acc = AccOf<T>;
  static constexpr int kThreads = 256;
  static constexpr int kBlock = 64;  // features of a compute tile, on either side
  static constexpr int kTileN = kTileN_;
  using XPanel = Panel<T, kTileN, kThreads>;

  static constexpr int kVec = XPanel::kVec;
  static constexpr int kLanes = XPanel::kVectors;
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kSplits = max_of(1, kGroups / kBlock);
  static constexpr int kRows = max_of(1, kBlock / kGroups);

  static constexpr int kStaged = sizeof(Acc) == 4 && kTileN < 128 ? 3 : 2;  // entries a thread keeps in registers
  static constexpr int kCapacity = 1024;                                    // sorted entries in shared memory at a time

  // Panels this small wait in registers while the block before them is computed.
  static constexpr bool kPrefetchX = XPanel::kItemsPerThread * kVec * sizeof(Acc) <= 32;
  static constexpr int kFetchItems = kPrefetchX ? XPanel::kItemsPerThread : 2;

  // Thread blocks a multiprocessor shall hold: the most for which nothing spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kMinBlocks = kTileN == 128 ? 2 : 3;
#else
  static constexpr int kMinBlocks = kTileN == 1 && sizeof(Acc) == 4 ? 4 : 3;
#endif

  static_assert(kLanes <= 32, "the lanes of a row stay in one warp");
  static_assert(kLanes * kSplits <= 32, "the splits of a row stay in one warp");
  static_assert(kThreads / (kLanes * kSplits) * kRows == kBlock, "the row groups cover the tile once");
  static_assert(XPanel::kItemsPerThread % kFetchItems == 0, "the panel is fetched in whole batches");
};

// A sorted entry: what it multiplies and where its row of the X panel begins.
template <typename Acc>
struct alignas(2 * sizeof(Acc)) GatherEntry {
  Acc value;
  int32_t x_offset;
};

template <typename Config>
struct alignas(16) GatherShared {
  using Acc = typename Config::Acc;
  alignas(16) Acc panel[Config::XPanel::kElements];  // X, and the results on their way out
  alignas(16) GatherEntry<Acc> entries[Config::kCapacity];
  unsigned long long masks[Config::kBlock];  // bit `in` of masks[out]: the entry is there
  int64_t x_offsets[Config::kTileN];
  int64_t y_offsets[Config::kTileN];
};

}  // namespace csb::cuda
