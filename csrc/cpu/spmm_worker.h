#pragma once

#include "cpu/epilogue.h"
#include "cpu/pack.h"
#include "cpu/spmm_kernel.h"

// A range of SpMM tasks on one thread. Kernel header: see kernel_prelude.h.
//
// Task t is (column tile t / per_tile, strip or unit t % per_tile). For each strip the output tile [block_size][width]
// is summed in scratch over the blocks of the strip, each times the tile of its input features.
namespace csb::cpu::CSB_CPU_ISA {

// 16-bit values are widened this many at a time.
constexpr int32_t kValueChunk = 4096;

// Strips that share a packed tile where the tiles don't all stay.
constexpr int64_t kStripsTogether = 8;

// Of an input feature in W.X: where X is small, and where it is larger than what stays packed.
constexpr int64_t kEntriesWorthPacking = 40;
constexpr int64_t kEntriesWorthPackingLarge = 16;

template <typename T>
class SpmmWorker {
 public:
  using C = Compute<T>;

  SpmmWorker(const SpmmProblem& problem, const plan::CpuSpmmConfig& config)
      : p_(problem), tile_n_(config.tile_n), block_size_(problem.w.block_size()) {
    const int64_t tile = int64_t{block_size_} * tile_n_;
    const int64_t fit = max_of<int64_t>(1, kPackedBytes / (tile * static_cast<int64_t>(sizeof(C))));
    const int64_t in_blocks = p_.blocks_per_strip();
    const bool all_fit = in_blocks <= fit;
    together_ = static_cast<int32_t>(all_fit ? 1 : max_of<int64_t>(1, min_of<int64_t>(kStripsTogether, fit / 2)));
    kept_ = static_cast<int32_t>(all_fit ? in_blocks : fit + 1 - together_);
    const int64_t slots = kept_ + (all_fit ? 0 : 1);
    const int64_t chunk = kConverts ? kValueChunk : 0;
    ScratchCutter scratch(ScratchCutter::bytes<C>(tile * together_) + ScratchCutter::bytes<C>(tile * slots) +
                          ScratchCutter::bytes<C>(chunk) + ScratchCutter::bytes<uint8_t>(kept_));
    sum_ = scratch.template take<C>(tile * together_);
    packed_ = scratch.template take<C>(tile * slots);
    chunk_ = scratch.template take<C>(chunk);
    is_packed_ = scratch.template take<uint8_t>(kept_);
  }

  void select_tile(int64_t tile) {
    first_column_ = tile * tile_n_;
    const int32_t count = static_cast<int32_t>(min_of<int64_t>(tile_n_, p_.y.columns - first_column_));
    width_ = tile_width(count);
    locate_columns(p_.x, first_column_, count, x_);
    locate_columns(p_.y, first_column_, count, y_);
    multiply_ = choose_block_kernel<C>(width_, p_.transposed);
    __builtin_memset(is_packed_, 0, static_cast<size_t>(kept_));
    passing_ = -1;
    const bool in_rows = !kConverts && x_.runs == 1 && count == width_;
    reads_in_place_ = in_rows && (p_.x.stride_f == width_ || (width_ >= kApartWidth && !packing_pays()));
    in_stride_ = static_cast<uint32_t>(reads_in_place_ ? p_.x.stride_f : width_);
  }

  void run_strips(int32_t first, int32_t end) {
    const int32_t in_blocks = p_.blocks_per_strip();
    for (; first < end; first += together_) {
      const int32_t count = min_of(together_, end - first);
      for (int32_t i = 0; i < count; ++i) clear_sum(first + i, sum_of(i));
      for (int32_t in_block = 0; in_block < in_blocks; ++in_block) {
        for (int32_t i = 0; i < count; ++i) add_block(first + i, in_block, sum_of(i));
      }
      for (int32_t i = 0; i < count; ++i) write_output(first + i, sum_of(i));
    }
  }

  void run_unit(int32_t unit) {
    const int32_t per_strip = p_.blocks_per_strip();
    const int32_t unit_end = p_.units[unit + 1];
    for (int32_t first = p_.units[unit]; first < unit_end;) {
      const int32_t strip = first / per_strip;
      const int32_t strip_end = (strip + 1) * per_strip;
      const int32_t end = min_of(unit_end, strip_end);
      clear_sum(strip, sum_);
      for (int32_t position = first; position < end; ++position) add_block(strip, position - strip * per_strip, sum_);
      if (end - first == per_strip) {
        write_output(strip, sum_);
      } else {
        write_share(unit, strip);
      }
      first = end;
    }
  }

  // Adds the shares of a strip in unit order. Strips that one unit has whole are already written.
  void join_strip(int32_t strip) {
    const int32_t first = strip * p_.blocks_per_strip();
    const int32_t end = first + p_.blocks_per_strip();
    int32_t unit = last_unit_at(first);
    if (p_.units[unit + 1] >= end) return;
    const int32_t features = features_of(strip);
    clear_sum(strip, sum_);
    for (; unit < p_.num_units && p_.units[unit] < end; ++unit) {
      if (p_.units[unit] == p_.units[unit + 1]) continue;
      for (int32_t f = 0; f < features; ++f) {
        const C* from = share(unit, strip) + f * p_.y.columns;
        C* to = sum_ + static_cast<int64_t>(f) * width_;
        for (int32_t j = 0; j < y_.count; ++j) to[j] += from[j];
      }
    }
    write_output(strip, sum_);
  }

 private:
  static constexpr bool kConverts = !std::is_same_v<T, C>;

  // Whether a tile's rows that stand far apart in X are worth a copy of their own. W.X comes back to a row with every
  // entry of its feature, and rows apart share few sets of a cache; W^T.X reads them one after another.
  bool packing_pays() const {
    const int64_t bytes = p_.in_features() * p_.x.stride_f * static_cast<int64_t>(sizeof(C));
    if (p_.transposed) return bytes > 2 * kPackedBytes;
    const int64_t worth = bytes > kPackedBytes ? kEntriesWorthPackingLarge : kEntriesWorthPacking;
    return p_.w.blk_ptr[p_.w.num_blocks()] > worth * p_.in_features();
  }

  int32_t features_of(int32_t strip) const { return min_of(block_size_, p_.out_features() - strip * block_size_); }

  C* share(int32_t unit, int32_t strip) const {
    return static_cast<C*>(p_.partials) + (int64_t{unit} + strip) * block_size_ * p_.y.columns + first_column_;
  }

  // The last unit that begins at or before a position; empty units before it begin there too.
  int32_t last_unit_at(int32_t position) const {
    int32_t low = 0;
    int32_t high = p_.num_units;
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (p_.units[middle] <= position ? low : high) = middle;
    }
    return low;
  }

  const C* input_tile(int32_t block) {
    if (reads_in_place_) {
      return static_cast<const C*>(p_.x.data) + int64_t{block} * block_size_ * p_.x.stride_f + x_.offset[0];
    }
    const bool keeps = block < kept_;
    C* tile = packed_ + int64_t{keeps ? block : kept_} * block_size_ * tile_n_;
    if (keeps ? is_packed_[block] : block == passing_) return tile;
    const int32_t first = block * block_size_;
    load_tile(static_cast<const T*>(p_.x.data) + first * p_.x.stride_f, p_.x.stride_f, x_,
              min_of(block_size_, p_.in_features() - first), width_, tile);
    if (keeps) {
      is_packed_[block] = 1;
    } else {
      passing_ = block;
    }
    return tile;
  }

  C* sum_of(int32_t i) const { return sum_ + int64_t{i} * block_size_ * tile_n_; }

  void clear_sum(int32_t strip, C* sum) const {
    __builtin_memset(sum, 0, sizeof(C) * static_cast<size_t>(features_of(strip) * width_));
  }

  void add_block(int32_t strip, int32_t in_block, C* sum) {
    const int32_t block = p_.transposed ? in_block * p_.w.kb + strip : strip * p_.w.kb + in_block;
    const int32_t begin = p_.w.begin(block);
    const int32_t count = p_.w.end(block) - begin;
    if (count == 0) return;
    const C* in = input_tile(in_block);
    const uint16_t* codes = p_.w.codes + begin;
    const T* values = static_cast<const T*>(p_.values) + begin;
    if constexpr (kConverts) {
      for (int32_t done = 0; done < count; done += kValueChunk) {
        const int32_t part = min_of(kValueChunk, count - done);
        load_run(values + done, chunk_, part);
        multiply_(codes + done, chunk_, part, p_.w.block_shift, in, in_stride_, sum);
      }
    } else {
      multiply_(codes, values, count, p_.w.block_shift, in, in_stride_, sum);
    }
  }

  void write_output(int32_t strip, C* sum) {
    const int32_t first = strip * block_size_;
    const int32_t features = features_of(strip);
    const T* bias = p_.bias == nullptr ? nullptr : static_cast<const T*>(p_.bias) + first;
    finish_tile(bias, p_.activation, features, width_, sum);
    store_tile(sum, width_, y_, features, p_.y.stride_f, static_cast<T*>(p_.y.data) + first * p_.y.stride_f);
  }

  void write_share(int32_t unit, int32_t strip) {
    C* to = share(unit, strip);
    const int32_t features = features_of(strip);
    for (int32_t f = 0; f < features; ++f) {
      __builtin_memcpy(to + f * p_.y.columns, sum_ + static_cast<int64_t>(f) * width_,
                       sizeof(C) * static_cast<size_t>(y_.count));
    }
  }

  const SpmmProblem& p_;
  const int32_t tile_n_;
  const int32_t block_size_;
  int32_t together_;    // strips
  int32_t kept_;        // input blocks whose packed tile stays
  C* sum_;              // [together_][block_size][width]
  C* packed_;           // [kept_ + 1][block_size][width]
  C* chunk_;            // [kValueChunk]
  uint8_t* is_packed_;  // [kept_]
  int32_t passing_;     // the input block whose tile stands behind those
  int64_t first_column_ = 0;
  int32_t width_ = 0;
  bool reads_in_place_ = false;
  uint32_t in_stride_ = 0;  // between an input tile's rows
  Columns x_;
  Columns y_;
  BlockKernel<C> multiply_ = nullptr;
};

template <typename T>
void spmm_range(const SpmmProblem& p, const plan::CpuSpmmConfig& config, int64_t begin, int64_t end) {
  const bool units = cuts_units(p, config);
  const int64_t per_tile = tasks_per_tile(p, config);
  SpmmWorker<T> worker(p, config);
  for (int64_t tile = begin / per_tile; begin < end; ++tile) {
    worker.select_tile(tile);
    const int64_t tile_end = min_of(end, (tile + 1) * per_tile);
    int32_t item = static_cast<int32_t>(begin - tile * per_tile);
    const int32_t end_item = static_cast<int32_t>(tile_end - tile * per_tile);
    if (units) {
      for (; item < end_item; ++item) worker.run_unit(item);
    } else {
      worker.run_strips(item, end_item);
    }
    begin = tile_end;
  }
}

template <typename T>
void join_range(const SpmmProblem& p, const plan::CpuSpmmConfig& config, int64_t begin, int64_t end) {
  SpmmWorker<T> worker(p, config);
  for (int64_t tile = begin / p.strips(); begin < end; ++tile) {
    worker.select_tile(tile);
    const int64_t tile_end = min_of(end, (tile + 1) * p.strips());
    for (; begin < tile_end; ++begin) worker.join_strip(static_cast<int32_t>(begin - tile * p.strips()));
  }
}

}  // namespace csb::cpu::CSB_CPU_ISA
