#include "plan/panel.h"

namespace csb::plan {
namespace {

// With fewer columns the expansion of W costs more than the product.
constexpr int64_t kMinColumns = 256;

// A multiple of every block size and of every tile height of the library's kernels.
constexpr int64_t kPanelStep = 256;

// The tile in which the library's large products are computed.
constexpr int64_t kTileFeatures = 128;
constexpr int64_t kTileWidth = 256;

int64_t item_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

int64_t waves(int64_t features, int64_t width, int32_t multiprocessors) {
  return ceil_div(ceil_div(features, kTileFeatures) * ceil_div(width, kTileWidth), int64_t{multiprocessors});
}

bool possible(DType dtype, int32_t block_shift, int64_t columns, const PanelOffer& offer) {
  return offer.fits && dtype != DType::kFloat64 && block_shift >= 4 && columns >= kMinColumns;
}

}  // namespace

int32_t panel_features(DType dtype, int64_t width, int32_t multiprocessors, const PanelOffer& offer) {
  const int64_t row_bytes = round_up<int64_t>(max_of<int64_t>(offer.depth, 1), 8) * item_size(dtype);
  const int64_t allowed = min_of(kMaxPanelBytes / row_bytes, offer.features - 1) / kPanelStep * kPanelStep;
  // A product whose tiles fill the last wave badly leaves the chip idle, and every panel has a last
  // wave: the fewest waves in all win, then the fewest panels.
  int64_t best = 0;
  int64_t best_waves = 0;
  for (int64_t features = allowed; features > 0; features -= kPanelStep) {
    const int64_t whole = offer.features / features;
    const int64_t rest = offer.features - whole * features;
    const int64_t all = whole * waves(features, width, multiprocessors) + waves(rest, width, multiprocessors);
    if (best == 0 || all < best_waves) {
      best = features;
      best_waves = all;
    }
  }
  return static_cast<int32_t>(best);
}

PanelChoice choose_spmm_panel(DType dtype, int32_t block_shift, int64_t columns, int32_t multiprocessors,
                              const PanelOffer& offer) {
  if (!possible(dtype, block_shift, columns, offer)) return {0, nullptr};
  const int32_t features = panel_features(dtype, columns, multiprocessors, offer);
  return {features, "panel: many columns make expanding W for a dense product cheaper than multiplying its entries"};
}

PanelChoice choose_sddmm_panel(DType dtype, int32_t block_shift, int64_t columns, int32_t multiprocessors,
                               const PanelOffer& offer) {
  if (!possible(dtype, block_shift, columns, offer)) return {0, nullptr};
  const int32_t features = panel_features(dtype, offer.depth, multiprocessors, offer);
  return {features, "panel: many columns make sampling a dense product cheaper than one product per entry"};
}

}  // namespace csb::plan
