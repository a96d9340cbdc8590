#pragma once

#include "cuda/device/panel.cuh"

namespace csb::cuda {

// Thread map of the gather kernel: kLanes lanes hold one vector of columns each, and a group of
// kLanes lanes owns kOwned entries, whose dot products grow in registers over all columns.
template <typename T>
struct SddmmGatherConfig {
  using Acc = AccOf<T>;
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBlock = 64;  // features of a compute tile, on either side
  static constexpr int kLanes = 8;
  static constexpr int kTileN = kLanes * (16 / sizeof(Acc));
  using FeaturePanel = Panel<T, kTileN, kThreads>;

  static constexpr int kVec = FeaturePanel::kVec;
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kOwned = sizeof(Acc) == 4 ? 16 : 8;
  static constexpr int kListed = kGroups * kOwned;
  static constexpr int kMinBlocks = 2;  // thread blocks a multiprocessor shall hold: the most without a spill

  static_assert(kVec * kLanes == kTileN, "the lanes of a group cover a row of the panel");
  static_assert(kListed % kThreads == 0, "the list is filled by whole rounds of all threads");
  static_assert(FeaturePanel::kElements <= 65536, "an offset in a panel fits 16 bits");
  static_assert(2 * kTileN <= kThreads, "one thread finds the offset of one column");
};

template <typename Config>
struct alignas(16) SddmmGatherShared {
  using Acc = typename Config::Acc;
  alignas(16) Acc a[Config::FeaturePanel::kElements];
  alignas(16) Acc b[Config::FeaturePanel::kElements];
  uint32_t places[Config::kListed];      // of a listed entry: offset of its row in a << 16 | of its column in b
  int32_t entries[Config::kListed];      // which entry of W it is
  int64_t a_offsets[2][Config::kTileN];  // of the columns of a tile, one slot ahead
  int64_t b_offsets[2][Config::kTileN];
  int32_t warp_counts[Config::kWarps];
};

}  // namespace csb::cuda
