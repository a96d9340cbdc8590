#pragma once

#include <optional>
#include <tuple>

#include "torch/checks.h"

// The border: tensors in, checked problem structs out. Index values are trusted here; they were
// validated where they entered (CSBMatrix.from_arrays, pack).
namespace csb::border {

// A problem, the tensor it writes, and the tensors that its pointers need alive.
struct SpmmCall {
  SpmmProblem problem;
  Tensor y;
  Tensor x;
  std::optional<Tensor> bias;
  std::optional<Tensor> partials;
};

struct SddmmCall {
  SddmmProblem problem;
  Tensor grad_values;
  Tensor a;
  Tensor b;
  std::optional<Tensor> partials;
};

SpmmCall prepare_spmm(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad,
                      const Tensor& units, const Tensor& x, const std::optional<Tensor>& bias, int64_t m, int64_t k,
                      int64_t block_size, int64_t dim, int64_t activation, bool transposed);
SddmmCall prepare_sddmm(const Tensor& codes, const Tensor& blk_ptr, const Tensor& blk_pad, const Tensor& units,
                        const Tensor& a, const Tensor& b, int64_t m, int64_t k, int64_t block_size, int64_t stored,
                        int64_t dim);

// Scratch for shared strips, [num_units + strips, block_size, columns].
void allocate_partials(SpmmCall& call);
// Scratch for split columns, [column_splits, entries].
void allocate_partials(SddmmCall& call, int32_t column_splits);

std::tuple<ConvertProblem, Tensor> prepare_count(const Tensor& dense, const std::optional<Tensor>& mask,
                                                 int64_t block_size);
std::tuple<ConvertProblem, Tensor, Tensor> prepare_pack(const Tensor& dense, const std::optional<Tensor>& mask,
                                                        const Tensor& blk_ptr, const Tensor& blk_pad,
                                                        int64_t block_size, int64_t stored);
std::tuple<ConvertProblem, Tensor, Tensor> prepare_pack_bitmap(const Tensor& dense, const std::optional<Tensor>& mask,
                                                               const Tensor& blk_ptr, const Tensor& blk_pad,
                                                               int64_t stored);
std::tuple<ConvertProblem, Tensor> prepare_to_codes(const Tensor& bitmap, const Tensor& blk_ptr, const Tensor& blk_pad,
                                                    int64_t m, int64_t k, int64_t stored);
std::tuple<ConvertProblem, Tensor> prepare_unpack(const Tensor& values, const Tensor& codes, const Tensor& blk_ptr,
                                                  const Tensor& blk_pad, int64_t m, int64_t k, int64_t block_size);

}  // namespace csb::border
