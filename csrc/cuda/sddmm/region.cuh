#pragma once

#include "cuda/sddmm/region_entries.cuh"
#include "cuda/sddmm/region_loader.cuh"

namespace csb::cuda {

// Keeps the sums of a region's entries, a pass at a time.
class SddmmRegionConsumer {
 public:
  using Config = SddmmRegionConfig;

  __device__ __forceinline__ SddmmRegionConsumer(const SddmmProblem& problem, const SddmmRegionLaunch& how,
                                                 SddmmRegionShared& shared)
      : problem_(problem), how_(how), shared_(shared) {}

  __device__ __forceinline__ void clear_padding() const {
    SddmmRegionEntries(problem_, how_, shared_).for_each_padding([&](int32_t entry) { store(entry, 0.0f); });
  }

  __device__ __forceinline__ void run() {
    SddmmRegionPasses passes(shared_);
    while (passes.next_own()) {
      SddmmRegionEntries(problem_, how_, shared_).list(passes);
      synchronize();
      multiply(passes);
      synchronize();  // the list is no longer read
    }
  }

 private:
  __device__ __forceinline__ void synchronize() const {
    asm volatile("bar.sync 1, %0;" ::"n"(32 * Config::kConsumers) : "memory");
  }

  __device__ __forceinline__ void store(int32_t entry, float sum) const {
    if (problem_.column_splits > 1) {
      static_cast<float*>(problem_.partials)[blockIdx.y * problem_.entries + entry] = sum;
    } else {
      static_cast<float*>(problem_.grad_values)[entry] = sum;
    }
  }

  // Neighbouring entries go to one group of lanes, which so reads their common row of A once. Of the two groups that
  // read at the same time, one has entries of either class.
  struct Share {
    int of;  // class
    int first;
    int count;  // of all entries of the class
    int slots;  // of every group
  };

  static __device__ __forceinline__ Share share_of(const SddmmRegionPasses& passes) {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // opaque, or what is known before the columns is kept in registers, and spills
    Share share;
    share.of = thread / Config::kLanes % Config::kClasses;
    share.count = passes.count(share.of);
    share.slots = ceil_div(max_of(passes.count(0), passes.count(1)), Config::kGroups);
    share.first = thread / (Config::kLanes * Config::kClasses) * share.slots;
    return share;
  }

  __device__ __forceinline__ void multiply(const SddmmRegionPasses& passes) {
    Owned own;
    float sums[Config::kSlots];
    take(own, share_of(passes));
#pragma unroll
    for (int k = 0; k < Config::kSlots; ++k) sums[k] = 0;
#pragma unroll 1
    for (int32_t tile = SddmmRegionColumns(problem_).tiles(); tile > 0; --tile) {
      mbarrier_wait(shared_address(&shared_.full[position_.slot]), position_.parity);
      add_products(shared_.stages[position_.slot], own, sums);
      __syncwarp();
      mbarrier_arrive(shared_address(&shared_.empty[position_.slot]));
      position_.advance(1);
    }
    const Share share = share_of(passes);
#pragma unroll
    for (int k = 0; k < Config::kSlots; ++k) {
      if (k >= share.slots) break;
      float sum = sums[k];
#pragma unroll
      for (int step = 1; step < Config::kLanes; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
      const bool mine = threadIdx.x % Config::kLanes == k % Config::kLanes && share.first + k < share.count;
      if (mine) store(shared_.entries[share.of][share.first + k], sum);
    }
  }

  // What a lane multiplies, slot by slot. Where a slot begins another row of A that row has been read before, and the
  // high half of its place says which row to read next.
  struct Owned {
    uint32_t places[Config::kSlots];
    int slots;
    uint32_t new_row;       // bit k: slot k begins one
    uint32_t new_row_warp;  // in any of the warp's groups
    uint32_t rows;          // of A, the first in the high half, the second one in the low
  };

  __device__ __forceinline__ void take(Owned& own, const Share& share) const {
    const uint32_t lane = 16 * (threadIdx.x % Config::kLanes) * 0x10001u;
#pragma unroll
    for (int k = 0; k < Config::kSlots; ++k) {
      const bool mine = k < share.slots && share.first + k < share.count;
      own.places[k] = (mine ? shared_.places[share.of][share.first + k] : 0) ^ lane;
    }
    own.slots = share.slots;
    own.new_row = 0;
    own.rows = own.places[0] & 0xffff0000;
    uint32_t next = own.places[Config::kSlots - 1] >> 16;
#pragma unroll
    for (int k = Config::kSlots - 1; k > 0; --k) {
      const uint32_t row = own.places[k] >> 16;
      const bool begins = row != own.places[k - 1] >> 16;
      own.new_row |= uint32_t(begins) << k;
      own.places[k] = next << 16 | (own.places[k] & 0xffff);
      if (begins) next = row;
    }
    own.rows |= next;
    own.new_row_warp = __reduce_or_sync(kFullWarp, own.new_row);
#pragma unroll
    for (int k = 0; k < Config::kSlots; ++k) asm volatile("" : "+r"(own.places[k]));  // not to be made anew
  }

  static __device__ __forceinline__ void add_products(const SddmmRegionStage& stage, const Owned& own,
                                                      float (&sums)[Config::kSlots]) {
    constexpr int kStep = Config::kSlotStep;
    const uint32_t a = shared_address(stage.a);
    const uint32_t b = shared_address(stage.b);
    uint32_t new_row = own.new_row;
    int slots = own.slots;
    asm volatile("" : "+r"(new_row), "+r"(slots));  // opaque, or bits and comparisons are kept in registers, and spill
    float4 col[2][kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) col[0][i] = load(b + (own.places[i] & 0xffff));
    float4 row = load(a + (own.rows >> 16));
    float4 next_row = load(a + (own.rows & 0xffff));
#pragma unroll
    for (int first = 0; first < Config::kSlots; first += kStep) {
      if (first >= slots) break;
      const auto& now = col[first / kStep % 2];
      auto& next = col[(first / kStep + 1) % 2];
#pragma unroll
      for (int i = 0; i < kStep && first + kStep < Config::kSlots; ++i) {
        next[i] = load(b + (own.places[first + kStep + i] & 0xffff));
      }
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const int k = first + i;
        if (k > 0 && (own.new_row_warp >> k & 1)) {
          advance_row(new_row & 1u << k, row, next_row, a + (own.places[k] >> 16));
        }
        sums[k] += row.x * now[i].x;
        sums[k] += row.y * now[i].y;
        sums[k] += row.z * now[i].z;
        sums[k] += row.w * now[i].w;
      }
    }
  }

  // Where `wanted` is not zero, row becomes next_row and next_row is read. In one piece, or the compiler reads into
  // other registers, and waits there to move what it read.
  static __device__ __forceinline__ void advance_row(uint32_t wanted, float4& row, float4& next_row, uint32_t address) {
    asm volatile(
        "{ .reg .pred p;\n"
        "setp.ne.u32 p, %8, 0;\n"
        "@p mov.f32 %0, %4;\n"
        "@p mov.f32 %1, %5;\n"
        "@p mov.f32 %2, %6;\n"
        "@p mov.f32 %3, %7;\n"
        "@p ld.volatile.shared.v4.f32 {%4, %5, %6, %7}, [%9]; }"
        : "+f"(row.x), "+f"(row.y), "+f"(row.z), "+f"(row.w), "+f"(next_row.x), "+f"(next_row.y), "+f"(next_row.z),
          "+f"(next_row.w)
        : "r"(wanted), "r"(address));
  }

  // volatile keeps the loads of a step in front of its products, where they overlap.
  static __device__ __forceinline__ float4 load(uint32_t address) {
    float4 x;
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address));
    return x;
  }

  const SddmmProblem& problem_;
  const SddmmRegionLaunch& how_;
  SddmmRegionShared& shared_;
  RingPosition<Config::kStages> position_{0};
};

// Grid: x = region, row-major; y = run of columns; z: thread blocks that share the passes of a region.
template <VectorAccess kAccess>
__global__ void __launch_bounds__(SddmmRegionConfig::kThreads, 1)
    sddmm_region_kernel(const __grid_constant__ SddmmProblem problem, const __grid_constant__ SddmmRegionLaunch how) {
  using Config = SddmmRegionConfig;
  using Loader = SddmmRegionLoader<kAccess>;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<SddmmRegionShared*>(shared_bytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      mbarrier_init(shared_address(&shared.full[i]), Loader::kArrivals);
      mbarrier_init(shared_address(&shared.empty[i]), 32 * Config::kConsumers);
    }
  }
  // Uniform by construction, which the compiler can see only this way.
  const int warp_idx = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  SddmmRegionEntries(problem, how, shared).count();
  if (blockIdx.z == 0) SddmmRegionConsumer(problem, how, shared).clear_padding();
  if (shared.starts[0][Config::kRegion] == 0 && shared.starts[1][Config::kRegion] == 0) return;
  if (warp_idx < Config::kConsumers) {
    SddmmRegionConsumer(problem, how, shared).run();
  } else {
    Loader(problem, how, shared).run();
  }
}

}  // namespace csb::cuda
