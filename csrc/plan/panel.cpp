#include "plan/panel.h"

namespace csb::plan {
namespace {

// With fewer columns the product reads W's panel hardly more often than it was written.
constexpr int64_t kMinColumns = 256;

// Multiply-adds below which launching two kernels for each of two panels costs more than it gains:
// about 10 us of the tensor cores, 2 us of the CUDA cores.
constexpr int64_t kMinProduct16Bit = int64_t{1} << 32;
constexpr int64_t kMinProductFloat32 = int64_t{1} << 26;

// From this density on float32 multiplies all of W faster than W's entries alone; blocks of 64 have a
// faster kernel for the entries.
constexpr double min_density_float32(int32_t block_shift) { return block_shift == 6 ? 0.25 : 0.12; }

// A multiple of every block size and of every tile height of the library's kernels.
constexpr int64_t kPanelStep = 256;

// The tile in which the library computes large products.
constexpr int64_t kTileFeatures = 128;
constexpr int64_t kTileWidth = 256;

int64_t item_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

int64_t waves(int64_t features, int64_t width, int32_t multiprocessors) {
  return ceil_div(ceil_div(features, kTileFeatures) * ceil_div(width, kTileWidth), int64_t{multiprocessors});
}

bool worth_it(DType dtype, int32_t block_shift, int64_t columns, const PanelOffer& offer) {
  if (!offer.fits || dtype == DType::kFloat64 || block_shift < 4 || columns < kMinColumns) return false;
  const int64_t least = dtype == DType::kFloat32 ? kMinProductFloat32 : kMinProduct16Bit;
  return offer.features * offer.depth >= least / columns;
}

}  // namespace

int32_t panel_features(DType dtype, int64_t width, int32_t multiprocessors, const PanelOffer& offer) {
  const int64_t line_bytes = round_up<int64_t>(max_of<int64_t>(offer.depth, 1), 8) * item_size(dtype);
  const int64_t most = min_of(kMaxPanelBytes / line_bytes, offer.features - 1) / kPanelStep * kPanelStep;
  // The last wave of every panel leaves some of the chip idle: the fewest waves in all are best, then
  // the fewest panels. Of panels that are equal in both the smallest stay in the L2 cache best.
  int64_t best = 0;
  int64_t best_waves = 0;
  int64_t best_panels = 0;
  for (int64_t features = most; features > 0; features -= kPanelStep) {
    const int64_t whole = offer.features / features;
    const int64_t rest = offer.features - whole * features;
    const int64_t all = whole * waves(features, width, multiprocessors) + waves(rest, width, multiprocessors);
    const int64_t panels = whole + (rest > 0);
    if (best == 0 || all < best_waves || (all == best_waves && panels <= best_panels)) {
      best = features;
      best_waves = all;
      best_panels = panels;
    }
  }
  return static_cast<int32_t>(best);
}

PanelChoice choose_spmm_panel(DType dtype, int32_t block_shift, int64_t columns, int32_t multiprocessors,
                              const PanelOffer& offer) {
  if (!worth_it(dtype, block_shift, columns, offer)) return {0, nullptr};
  const double elements = static_cast<double>(offer.features) * static_cast<double>(offer.depth);
  if (dtype == DType::kFloat32 && static_cast<double>(offer.stored) < min_density_float32(block_shift) * elements) {
    return {0, nullptr};
  }
  return {panel_features(dtype, columns, multiprocessors, offer),
          "panel: with this many columns W is faster expanded, a panel at a time, for a dense product"};
}

PanelChoice choose_sddmm_panel(DType dtype, int32_t block_shift, int64_t columns, int32_t multiprocessors,
                               const PanelOffer& offer) {
  if (!worth_it(dtype, block_shift, columns, offer)) return {0, nullptr};
  return {panel_features(dtype, offer.depth, multiprocessors, offer),
          "panel: with this many columns a dense product, a panel at a time, is sampled faster than entries multiply"};
}

}  // namespace csb::plan
