#include "baseline/cpu/sddmm.h"

#include "baseline/cpu/numeric.h"

namespace csb::baseline::cpu {
namespace {

constexpr int kVectorBytes = 64;  // of the widest instruction set
// Independent sums of one dot product: the compiler may not reorder additions, and each would wait for the one before.
constexpr int kVectors = 4;

template <typename T>
CSB_INLINE AccOf<T> dot(const T* a, const T* b, int64_t n) {
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(AccOf<T>));
  constexpr int kWidth = kVectors * kLanes;
  AccOf<T> sum[kVectors][kLanes] = {};
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) sum[v][lane] += to_acc(a[at + lane]) * to_acc(b[at + lane]);
    }
  }
  for (; j + kLanes <= n; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sum[0][lane] += to_acc(a[j + lane]) * to_acc(b[j + lane]);
  }
  AccOf<T> total = 0;
  for (; j < n; ++j) total += to_acc(a[j]) * to_acc(b[j]);
  AccOf<T> all[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    all[lane] = (sum[0][lane] + sum[1][lane]) + (sum[2][lane] + sum[3][lane]);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) all[lane] += all[lane + half];
  }
  return total + all[0];
}

template <typename T>
CSB_INLINE void sample(const CsrSddmmProblem& p, int64_t begin, int64_t end) {
  const T* const a = static_cast<const T*>(p.a);
  const T* const b = static_cast<const T*>(p.b);
  T* const grad_values = static_cast<T*>(p.grad_values);
  for (int64_t row = begin; row < end; ++row) {
    for (int32_t e = p.w.row_ptr[row]; e < p.w.row_ptr[row + 1]; ++e) {
      from_acc(dot(a + row * p.n, b + p.w.col_ind[e] * p.n, p.n), grad_values[e]);
    }
  }
}

}  // namespace

CSB_DEFINE_FOR_EACH_ISA(sddmm, sample, CsrSddmmProblem)

}  // namespace csb::baseline::cpu
