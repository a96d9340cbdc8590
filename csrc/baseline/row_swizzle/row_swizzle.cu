#include <limits>

#include "baseline/row_swizzle/row_swizzle.cuh"
#include "baseline/row_swizzle/row_swizzle.h"
#include "cuda/device/launch.cuh"

namespace csb::baseline {
namespace {

enum class Tile {
  kColumns8,
  kColumns16,
  kColumns16Tall,
  kColumns32,
  kColumns64,
  kWide,
  kMiddle,
  kTall,
  kPairs,
  kScalar,
  kScalarWide
};

// In this order: lanes of a row, elements of an access, accesses of a thread, entries in flight, threads, blocks at
// least on one multiprocessor.
template <typename T>
struct Tiles;

template <>
struct Tiles<float> {
  using Columns8 = RowSwizzleConfig<8, 1, 1, 16, 128, 8>;
  using Columns16 = RowSwizzleConfig<16, 1, 1, 16, 128, 8>;
  using Columns16Tall = RowSwizzleConfig<8, 2, 1, 16, 128, 6>;
  using Columns32 = RowSwizzleConfig<16, 2, 1, 8, 128, 8>;
  using Columns64 = RowSwizzleConfig<32, 2, 1, 8, 128, 8>;
  using Wide = RowSwizzleConfig<32, 4, 1, 4, 128, 8>;
  using Middle = RowSwizzleConfig<16, 4, 1, 8, 128, 6>;
  using Tall = RowSwizzleConfig<8, 4, 2, 4, 256, 3>;
  using Pairs = Columns64;
  using Scalar = RowSwizzleConfig<32, 1, 1, 16, 128, 8>;
  using ScalarWide = RowSwizzleConfig<32, 1, 4, 4, 128, 6>;
};

struct HalfTiles {
  using Columns8 = RowSwizzleConfig<8, 1, 1, 16, 128, 8>;
  using Columns16 = RowSwizzleConfig<16, 1, 1, 16, 128, 8>;
  using Columns16Tall = RowSwizzleConfig<8, 2, 1, 16, 128, 6>;
  using Columns32 = RowSwizzleConfig<16, 2, 1, 8, 128, 8>;
  using Columns64 = RowSwizzleConfig<16, 4, 1, 8, 128, 8>;
  using Wide = RowSwizzleConfig<8, 8, 2, 4, 256, 2>;
  using Middle = RowSwizzleConfig<16, 8, 1, 4, 256, 3>;
  using Tall = Middle;
  using Pairs = RowSwizzleConfig<32, 2, 1, 8, 128, 8>;
  using Scalar = RowSwizzleConfig<32, 1, 2, 8, 128, 6>;
  using ScalarWide = Scalar;
};

template <>
struct Tiles<__nv_bfloat16> : HalfTiles {};
template <>
struct Tiles<__half> : HalfTiles {};

// Not tuned.
template <>
struct Tiles<double> {
  using Columns8 = RowSwizzleConfig<8, 1, 1, 8, 128, 6>;
  using Columns16 = RowSwizzleConfig<16, 1, 1, 8, 128, 6>;
  using Columns16Tall = Columns16;
  using Columns32 = RowSwizzleConfig<16, 2, 1, 4, 128, 6>;
  using Columns64 = RowSwizzleConfig<32, 2, 1, 4, 128, 6>;
  using Wide = Columns64;
  using Middle = Wide;
  using Tall = Wide;
  using Pairs = Wide;
  using Scalar = RowSwizzleConfig<32, 1, 1, 8, 128, 6>;
  using ScalarWide = Scalar;
};

// `vec` is how many neighbouring elements of X and Y an access may hold. The remarks compare speeds on an H200 over W
// of 4096 x 4096 to 28672 x 8192 with uniform random patterns of 50 to 98 % sparsity; in float32 unless said otherwise.
Tile choose_tile(const CsrSpmmProblem& problem, int element_bytes, int vec) {
  const int64_t n = problem.n;
  // A narrow output has few warps. Single elements, with 16 reads in flight, are 10 to 16 % ahead of pairs at n = 8.
  if (n <= 8) return Tile::kColumns8;
  // Pairs halve the warps: 25 % behind at m = 4096, 15 to 30 % ahead at m = 8192 up to 90 %.
  if (n <= 16) return vec > 1 && problem.w.m >= 8192 ? Tile::kColumns16Tall : Tile::kColumns16;
  // Odd n or addresses. The wide one is level with the other at n = 65 and up to 20 % ahead at n = 4097.
  if (vec == 1) return n <= 64 ? Tile::kScalar : Tile::kScalarWide;
  // Pairs give twice the warps of 16-byte reads, at n = 32 that is worth 6 to 14 %.
  if (n <= 32) return Tile::kColumns32;
  if (vec * element_bytes < 8) return Tile::kPairs;
  if (vec * element_bytes < kAccessBytes) return Tile::kColumns64;
  const double elements = static_cast<double>(problem.w.m) * problem.w.k;
  // Reads of 8 bytes, again for more warps: 15 % ahead of 16 bytes at 90 %, level at 70 %, 5 to 15 % behind at 50 %. In
  // bfloat16 between 7 % behind and 20 % ahead.
  if (n <= 64) return element_bytes > 2 && problem.w.nnz > 0.4 * elements ? Tile::kMiddle : Tile::kColumns64;
  // A warp that reads one row of X at a time is 15 to 25 % ahead while rows are so dense that their X stays in L1. In
  // bfloat16 two reads for every staged entry are up to 10 % ahead.
  if (problem.w.nnz > 0.15 * elements) return Tile::kWide;
  // At n = 256 the wide one is within 6 % of the best even at 98 %; in bfloat16 the middle one is the best.
  if (element_bytes > 2 && n <= 256) return Tile::kWide;
  // Sparser rows meet in L1 when panels are narrower: at n = 4096 this is 36 % ahead of the wide one at 90 %, 27 % at
  // 95 %. In bfloat16 it is within 2 % of the best from 90 % up.
  if (element_bytes == 2 || problem.w.nnz > 0.035 * elements) return Tile::kMiddle;
  // More rows on a multiprocessor share X: 13 % ahead of the middle one at 98 %, 3 % behind it at 95 %.
  return Tile::kTall;
}

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename T, typename Config>
cudaError_t launch_tile(const CsrSpmmProblem& problem, cudaStream_t stream) {
  RowSwizzleParams<T> params;
  params.w = problem.w;
  params.values = static_cast<const T*>(problem.values);
  params.aligned = is_aligned(problem.w.col_ind, kAccessBytes) &&
                   is_aligned(problem.values, min_of<size_t>(kAccessBytes, Config::kRun * sizeof(T)));
  params.x = static_cast<const T*>(problem.x);
  params.y = static_cast<T*>(problem.y);
  params.n = static_cast<uint32_t>(problem.n);
  params.x_pitch = static_cast<uint32_t>(problem.n * sizeof(T));

  constexpr int64_t kMaxGridY = 65535;
  const int64_t panels = ceil_div<int64_t>(problem.n, Config::kColumns);
  const int64_t grid_z = ceil_div(panels, kMaxGridY);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(problem.w.m, Config::kRows)),
                  static_cast<unsigned>(ceil_div(panels, grid_z)), static_cast<unsigned>(grid_z));
  return cuda::launch(row_swizzle_kernel<T, Config>, grid, dim3(Config::kThreads), 0, stream, params);
}

template <typename T>
cudaError_t row_swizzle_as(const CsrSpmmProblem& problem, cudaStream_t stream) {
  if (problem.n > std::numeric_limits<uint32_t>::max() / static_cast<int64_t>(sizeof(T))) return cudaErrorInvalidValue;
  int vec = kAccessBytes / sizeof(T);
  while (problem.n % vec != 0 || !is_aligned(problem.x, vec * sizeof(T)) || !is_aligned(problem.y, vec * sizeof(T))) {
    vec /= 2;
  }
  switch (choose_tile(problem, sizeof(T), vec)) {
    case Tile::kColumns8:
      return launch_tile<T, typename Tiles<T>::Columns8>(problem, stream);
    case Tile::kColumns16:
      return launch_tile<T, typename Tiles<T>::Columns16>(problem, stream);
    case Tile::kColumns16Tall:
      return launch_tile<T, typename Tiles<T>::Columns16Tall>(problem, stream);
    case Tile::kColumns32:
      return launch_tile<T, typename Tiles<T>::Columns32>(problem, stream);
    case Tile::kColumns64:
      return launch_tile<T, typename Tiles<T>::Columns64>(problem, stream);
    case Tile::kWide:
      return launch_tile<T, typename Tiles<T>::Wide>(problem, stream);
    case Tile::kMiddle:
      return launch_tile<T, typename Tiles<T>::Middle>(problem, stream);
    case Tile::kTall:
      return launch_tile<T, typename Tiles<T>::Tall>(problem, stream);
    case Tile::kPairs:
      return launch_tile<T, typename Tiles<T>::Pairs>(problem, stream);
    case Tile::kScalar:
      return launch_tile<T, typename Tiles<T>::Scalar>(problem, stream);
    case Tile::kScalarWide:
      return launch_tile<T, typename Tiles<T>::ScalarWide>(problem, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t row_swizzle(const CsrSpmmProblem& problem, cudaStream_t stream) {
  if (problem.w.m == 0 || problem.n == 0) return cudaSuccess;
  return cuda::dispatch_dtype(problem.dtype,
                              [&](auto tag) { return row_swizzle_as<typename decltype(tag)::type>(problem, stream); });
}

}  // namespace csb::baseline
