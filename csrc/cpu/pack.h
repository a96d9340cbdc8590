#pragma once

#include "cpu/numeric.h"

// Between activations in memory and tiles: [feature][width] in the compute type, contiguous, columns beyond the
// matrix zero. Kernel header: see kernel_prelude.h.
namespace csb::cpu::CSB_CPU_ISA {

constexpr int32_t kMaxTile = 64;

// Packed input tiles stay for the whole column tile as far as they fit into this part of a second-level cache; the
// blocks of the features beyond pack theirs each time.
constexpr int64_t kPackedBytes = int64_t{1} << 20;

// What memory needs to bring a line, where a tile's rows stand too far apart for the hardware to see a stream: on loads
// of rows, and on all stores.
constexpr int32_t kAheadFeatures = 32;
constexpr int32_t kAheadRows = 8;

// The widths a tile can have are 1, 4, 8, 16, 32 and 64: this is the narrowest that holds `columns`.
inline int32_t tile_width(int32_t columns) {
  if (columns <= 1) return 1;
  int32_t width = 4;
  while (width < columns) width *= 2;
  return width;
}

// The columns [first, first + count) of an activation tensor, as offsets and as runs of neighbours in memory.
struct Columns {
  int32_t count;
  int32_t runs;
  int32_t run_begin[kMaxTile + 1];
  int64_t offset[kMaxTile];
};

inline void locate_columns(const DenseView& view, int64_t first, int32_t count, Columns& columns) {
  int64_t index[3] = {0, 0, first};
  if (view.size[0] != 1 || view.size[1] != 1) {
    index[2] = first % view.size[2];
    const int64_t rest = first / view.size[2];
    index[1] = rest % view.size[1];
    index[0] = rest / view.size[1];
  }
  columns.count = count;
  columns.runs = 0;
  for (int32_t j = 0; j < count; ++j) {
    const int64_t offset = index[0] * view.stride[0] + index[1] * view.stride[1] + index[2] * view.stride[2];
    columns.offset[j] = offset;
    if (j == 0 || offset != columns.offset[j - 1] + 1) columns.run_begin[columns.runs++] = j;
    if (++index[2] == view.size[2]) {
      index[2] = 0;
      if (++index[1] == view.size[1]) {
        index[1] = 0;
        ++index[0];
      }
    }
  }
  columns.run_begin[columns.runs] = count;
}

// Below four columns a run, element by element is as fast.
inline bool has_long_runs(const Columns& columns) { return columns.runs * 4 <= columns.count; }

template <int kForWriting, typename T>
CSB_INLINE void prefetch_run(const T* run, int32_t count) {
  for (int32_t j = 0; j < count; j += 64 / static_cast<int32_t>(sizeof(T))) __builtin_prefetch(run + j, kForWriting);
}

// Features [begin, end) of column j, consecutive in memory.
template <typename T>
CSB_INLINE void load_column(const T* from, int32_t begin, int32_t end, int32_t width, Compute<T>* tile) {
  for (int32_t f = begin; f < end; ++f) tile[f * width] = to_compute(from[f]);
}

template <typename T>
CSB_INLINE void store_column(const Compute<T>* tile, int32_t begin, int32_t end, int32_t width, T* to) {
  for (int32_t f = begin; f < end; ++f) to[f] = from_compute<T>(tile[f * width]);
}

// kCount columns by as many features as make whole vectors; returns the first feature that is left.
template <typename T, int kCount>
inline int32_t load_square(const T* from, const int64_t* offset, int32_t features, int32_t width, Compute<T>* tile) {
  Vector<Compute<T>, kCount> rows[kCount];
  int32_t f = 0;
  for (; f + kCount <= features; f += kCount) {
    CSB_UNROLL
    for (int i = 0; i < kCount; ++i) rows[i] = load_compute<T, kCount>(from + offset[i] + f);
    transpose<Compute<T>, kCount>(rows);
    CSB_UNROLL
    for (int i = 0; i < kCount; ++i) store_vector(rows[i], tile + (f + i) * width);
  }
  return f;
}

template <typename T, int kCount>
inline int32_t store_square(const Compute<T>* tile, int32_t width, int32_t features, const int64_t* offset, T* to) {
  Vector<Compute<T>, kCount> rows[kCount];
  int32_t f = 0;
  for (; f + kCount <= features; f += kCount) {
    CSB_UNROLL
    for (int i = 0; i < kCount; ++i) rows[i] = load_vector<Vector<Compute<T>, kCount>>(tile + (f + i) * width);
    transpose<Compute<T>, kCount>(rows);
    CSB_UNROLL
    for (int i = 0; i < kCount; ++i) {
      store_compute<T, kCount>(rows[i], to + offset[i] + f);
      __builtin_prefetch(to + offset[i] + f + kAheadFeatures, 1);
    }
  }
  return f;
}

template <typename T>
inline void load_features_last(const T* from, const Columns& columns, int32_t features, int32_t width,
                               Compute<T>* tile) {
  constexpr int32_t kCount = kLanes<Compute<T>>;
  int32_t j = 0;
  for (; j + kCount <= columns.count; j += kCount) {
    const int32_t f = load_square<T, kCount>(from, columns.offset + j, features, width, tile + j);
    for (int32_t i = j; f < features && i < j + kCount; ++i) {
      load_column(from + columns.offset[i], f, features, width, tile + i);
    }
  }
  for (; j < columns.count; ++j) load_column(from + columns.offset[j], 0, features, width, tile + j);
}

template <typename T>
inline void store_features_last(const Compute<T>* tile, int32_t width, const Columns& columns, int32_t features,
                                T* to) {
  constexpr int32_t kCount = kLanes<Compute<T>>;
  int32_t j = 0;
  for (; j + kCount <= columns.count; j += kCount) {
    const int32_t f = store_square<T, kCount>(tile + j, width, features, columns.offset + j, to);
    for (int32_t i = j; f < features && i < j + kCount; ++i) {
      store_column(tile + i, f, features, width, to + columns.offset[i]);
    }
  }
  for (; j < columns.count; ++j) store_column(tile + j, 0, features, width, to + columns.offset[j]);
}

// tile[f][j] = features [0, features) of the columns; `from` points at the first feature.
template <typename T>
inline void load_tile(const T* from, int64_t stride_f, const Columns& columns, int32_t features, int32_t width,
                      Compute<T>* tile) {
  if (width == 1 && stride_f == 1) {
    load_run(from + columns.offset[0], tile, features);
    return;
  }
  if (columns.count < width) __builtin_memset(tile, 0, sizeof(Compute<T>) * static_cast<size_t>(features * width));
  if (stride_f == 1) {
    load_features_last(from, columns, features, width, tile);
    return;
  }
  const bool long_runs = has_long_runs(columns);
  for (int32_t f = 0; f < features; ++f, from += stride_f, tile += width) {
    if (long_runs) {
      for (int32_t r = 0; r < columns.runs; ++r) {
        const int32_t j = columns.run_begin[r];
        load_run(from + columns.offset[j], tile + j, columns.run_begin[r + 1] - j);
        prefetch_run<0>(from + columns.offset[j] + kAheadRows * stride_f, columns.run_begin[r + 1] - j);
      }
    } else {
      for (int32_t j = 0; j < columns.count; ++j) tile[j] = to_compute(from[columns.offset[j]]);
    }
  }
}

template <typename T>
inline void store_tile(const Compute<T>* tile, int32_t width, const Columns& columns, int32_t features,
                       int64_t stride_f, T* to) {
  if (width == 1 && stride_f == 1) {
    store_run(tile, to + columns.offset[0], features);
    return;
  }
  if (stride_f == 1) {
    store_features_last(tile, width, columns, features, to);
    return;
  }
  const bool long_runs = has_long_runs(columns);
  for (int32_t f = 0; f < features; ++f, to += stride_f, tile += width) {
    if (long_runs) {
      for (int32_t r = 0; r < columns.runs; ++r) {
        const int32_t j = columns.run_begin[r];
        store_run(tile + j, to + columns.offset[j], columns.run_begin[r + 1] - j);
        prefetch_run<1>(to + columns.offset[j] + kAheadRows * stride_f, columns.run_begin[r + 1] - j);
      }
    } else {
      for (int32_t j = 0; j < columns.count; ++j) to[columns.offset[j]] = from_compute<T>(tile[j]);
    }
  }
}

}  // namespace csb::cpu::CSB_CPU_ISA
