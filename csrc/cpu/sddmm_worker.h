#pragma once

#include "cpu/pack.h"
#include "cpu/sddmm_kernel.h"

// A range of SDDMM tasks on one thread. Kernel header: see kernel_prelude.h.
//
// Task t is (column split t / num_units, unit t % num_units). Units that follow each other in a range are one run of
// blocks; it is walked in groups whose sums fit into scratch, and for each group the column tiles are the outer loop,
// so that a packed tile serves every block of the group.
namespace csb::cpu::CSB_CPU_ISA {

constexpr int64_t kGroupEntries = int64_t{1} << 17;

template <typename T>
class SddmmWorker {
 public:
  using C = Compute<T>;

  SddmmWorker(const SddmmProblem& problem, const plan::CpuSddmmConfig& config)
      : p_(problem), config_(config), block_size_(problem.w.block_size()) {
    const int64_t tile = int64_t{block_size_} * config.tile_n;
    const int64_t fit = max_of<int64_t>(1, kPackedBytes / (tile * static_cast<int64_t>(sizeof(C))));
    kept_ = static_cast<int32_t>(min_of<int64_t>(fit, p_.w.kb));
    const int64_t slots = kept_ + (p_.w.kb > kept_ ? 1 : 0);
    // One block may exceed a group; padding never makes it longer than its elements.
    group_entries_ = min_of(max_of(kGroupEntries, int64_t{block_size_} * block_size_), p_.entries);
    ScratchCutter scratch(ScratchCutter::bytes<C>(tile) + ScratchCutter::bytes<C>(tile * slots) +
                          ScratchCutter::bytes<C>(group_entries_) + ScratchCutter::bytes<uint8_t>(kept_));
    a_tile_ = scratch.template take<C>(tile);
    b_tiles_ = scratch.template take<C>(tile * slots);
    sum_ = scratch.template take<C>(group_entries_);
    is_packed_ = scratch.template take<uint8_t>(kept_);
  }

  void run_blocks(int64_t split, int32_t first, int32_t end) {
    const int64_t tiles = column_tiles(p_.a.columns, config_.tile_n);
    const int64_t tile_begin = tiles * split / config_.column_splits;
    const int64_t tile_end = tiles * (split + 1) / config_.column_splits;
    while (first < end) {
      const int32_t group_end = end_of_group(first, end);
      const int32_t* ptr = p_.w.blk_ptr;
      const int64_t entries = ptr[group_end] - ptr[first];
      if (entries > 0) {
        __builtin_memset(sum_, 0, sizeof(C) * static_cast<size_t>(entries));
        for (int64_t tile = tile_begin; tile < tile_end; ++tile) add_tile(tile, first, group_end);
        store_sums(split, ptr[first], entries);
      }
      first = group_end;
    }
  }

 private:
  int32_t end_of_group(int32_t first, int32_t end) const {
    const int32_t* ptr = p_.w.blk_ptr;
    int32_t group_end = first + 1;
    while (group_end < end && ptr[group_end + 1] - ptr[first] <= group_entries_) ++group_end;
    return group_end;
  }

  void add_tile(int64_t tile, int32_t first, int32_t end) {
    const int64_t column = tile * config_.tile_n;
    const int32_t count = static_cast<int32_t>(min_of<int64_t>(config_.tile_n, p_.a.columns - column));
    width_ = tile_width(count);
    locate_columns(p_.a, column, count, a_);
    locate_columns(p_.b, column, count, b_);
    __builtin_memset(is_packed_, 0, static_cast<size_t>(kept_));
    const DotKernel<C> dot = choose_dot_kernel<C>(width_);
    int32_t packed_row = -1;
    for (int32_t block = first; block < end; ++block) {
      const int32_t begin = p_.w.begin(block);
      const int32_t entries = p_.w.end(block) - begin;
      if (entries == 0) continue;
      const int32_t block_row = block / p_.w.kb;
      if (block_row != packed_row) pack(p_.a, a_, block_row, p_.w.m, a_tile_);
      packed_row = block_row;
      const C* b_tile = column_tile(block - block_row * p_.w.kb);
      dot(p_.w.codes + begin, entries, p_.w.block_shift, a_tile_, b_tile, sum_ + (begin - p_.w.blk_ptr[first]));
    }
  }

  void pack(const DenseView& view, const Columns& columns, int32_t block, int32_t features, C* tile) const {
    const int32_t first = block * block_size_;
    load_tile(static_cast<const T*>(view.data) + first * view.stride_f, view.stride_f, columns,
              min_of(block_size_, features - first), width_, tile);
  }

  const C* column_tile(int32_t block) {
    const bool keeps = block < kept_;
    C* tile = b_tiles_ + int64_t{keeps ? block : kept_} * block_size_ * config_.tile_n;
    if (keeps && is_packed_[block]) return tile;
    pack(p_.b, b_, block, p_.w.k, tile);
    if (keeps) is_packed_[block] = 1;
    return tile;
  }

  void store_sums(int64_t split, int64_t first, int64_t entries) const {
    if (config_.column_splits == 1) {
      store_run(sum_, static_cast<T*>(p_.grad_values) + first, entries);
    } else {
      C* to = static_cast<C*>(p_.partials) + split * p_.entries + first;
      __builtin_memcpy(to, sum_, sizeof(C) * static_cast<size_t>(entries));
    }
  }

  const SddmmProblem& p_;
  const plan::CpuSddmmConfig& config_;
  const int32_t block_size_;
  int32_t kept_;  // block columns whose packed tile of B stays
  int64_t group_entries_;
  C* a_tile_;           // [block_size][width]
  C* b_tiles_;          // [kept_ + 1][block_size][width]
  C* sum_;              // [group_entries_]
  uint8_t* is_packed_;  // [kept_]
  int32_t width_ = 0;
  Columns a_;
  Columns b_;
};

template <typename T>
void sddmm_range(const SddmmProblem& p, const plan::CpuSddmmConfig& config, int64_t begin, int64_t end) {
  SddmmWorker<T> worker(p, config);
  for (int64_t split = begin / p.num_units; begin < end; ++split) {
    const int64_t first = begin - split * p.num_units;
    const int64_t last = min_of<int64_t>(end - split * p.num_units, p.num_units);
    worker.run_blocks(split, p.units[first], p.units[last]);
    begin = (split + 1) * p.num_units;
  }
}

template <typename T>
void sddmm_join_range(const SddmmProblem& p, const plan::CpuSddmmConfig& config, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const C* partials = static_cast<const C*>(p.partials);
  constexpr int64_t kChunk = 256;
  C sum[kChunk];
  for (int64_t e = begin * kSddmmJoinEntries; e < min_of(end * kSddmmJoinEntries, p.entries); e += kChunk) {
    const int64_t count = min_of(kChunk, p.entries - e);
    load_run(partials + e, sum, count);
    for (int32_t split = 1; split < config.column_splits; ++split) {
      const C* from = partials + split * p.entries + e;
      for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
    }
    store_run(sum, static_cast<T*>(p.grad_values) + e, count);
  }
}

}  // namespace csb::cpu::CSB_CPU_ISA
