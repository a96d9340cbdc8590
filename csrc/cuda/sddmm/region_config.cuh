#pragma once

#include "csb/csb.h"
#include "cuda/device/mbarrier.cuh"
#include "cuda/device/vector_access.cuh"

namespace csb::cuda {

// A thread block computes the entries of 4 x 4 blocks of W with two kinds of warps: loaders fill a ring of stages with
// columns of A and B, consumers keep a sum for every entry. Four lanes share an entry, four of a stage's columns each.
struct SddmmRegionConfig {
  static constexpr int kBlocks = 4;  // along each side
  static constexpr int kRegion = 64 * kBlocks;
  static constexpr int kTileN = 16;
  static constexpr int kVec = 4;  // columns of a lane, 16 bytes
  static constexpr int kLanes = kTileN / kVec;
  static constexpr int kStages = 4;
  static constexpr int kConsumers = 16;
  static constexpr int kLoaders = 4;
  static constexpr int kThreads = 32 * (kConsumers + kLoaders);
  static constexpr int kClasses = 2;  // of features, see region_class()
  static constexpr int kGroups = 32 * kConsumers / kLanes / kClasses;
  static constexpr int kSlots = 28;                   // entries of a lane
  static constexpr int kSlotStep = 2;                 // of them under way while as many are multiplied
  static constexpr int kCapacity = kGroups * kSlots;  // entries of a class in a pass over the columns
  static constexpr int kItemFeatures = 32;            // of A or B that a loader fetches or skips together

  static_assert(kRegion % (kItemFeatures * kLoaders) == 0, "every loader has as many items");
  static_assert(kSlots % kSlotStep == 0 && kSlots <= 32, "whole steps, a bit for every slot");
  static_assert(kCapacity >= kRegion, "a row fits a pass");
};

// A feature's 16 columns fill 64 bytes, two features the 32 banks. Neighbouring features are of different classes: a
// read of two features of different classes meets in no bank. The bits that decide where among the banks a feature's
// four vectors lie are those that keep a loader's stores apart as well: 32 features x 4 columns in a step.
__device__ __forceinline__ int region_class(int feature) { return (feature ^ (feature >> 4)) & 1; }

// Byte offset of vector 0 of a feature; vector v is at offset ^ 16 v.
__device__ __forceinline__ int region_offset(int feature) {
  return (feature >> 1) * 128 | region_class(feature) * 64 | ((feature >> 2) & 3) * 16;
}

struct SddmmRegionStage {
  float a[SddmmRegionConfig::kRegion * SddmmRegionConfig::kTileN];
  float b[SddmmRegionConfig::kRegion * SddmmRegionConfig::kTileN];
};

struct alignas(128) SddmmRegionShared {
  using Config = SddmmRegionConfig;
  SddmmRegionStage stages[Config::kStages];
  // Of a pass, class by class and by row: where an entry's features stand in a stage (A's in the high half), its
  // number.
  uint32_t places[Config::kClasses][Config::kCapacity];
  int32_t entries[Config::kClasses][Config::kCapacity];
  int32_t starts[Config::kClasses][Config::kRegion + 1];  // of every row's entries among those of the region
  int32_t next[Config::kClasses][Config::kRegion];        // place of a row's next entry, while they are listed
  int32_t quota;                                          // entries of a class that a pass takes at most
  int32_t rows;                                           // of W in the region, at most kRegion
  int32_t cols;
  MBarrier full[Config::kStages];
  MBarrier empty[Config::kStages];
};

struct SddmmRegionLaunch {
  int32_t regions_k;  // along a row of W
};

}  // namespace csb::cuda
