// Every operator's schema. Implementations: cpu.cpp and cuda.cpp, of csr_*: baseline.cpp; fakes and
// FLOP formulas: torch_csb/_fake.py; derivatives: torch_csb/autograd.py.
//
// A pattern is (codes, blk_ptr, blk_pad, units), see csb/csb.h and plan/units.h; `codes` are uint8, or
// int64 where they are a bitmap. x, a and b are activations whose dimension `dim` holds the features; their other
// dimensions are the columns. activation: 0 none, 1 relu, 2 relu6, 3 silu, 4 gelu (erf).

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_csb, library) {
  // Y = act(W . X + bias)
  library.def(
      "spmm(Tensor values, Tensor codes, Tensor blk_ptr, Tensor blk_pad, Tensor units, Tensor x, Tensor? bias, "
      "int m, int k, int block_size, int dim, int activation) -> Tensor");
  // Y = act(W^T . X + bias)
  library.def(
      "spmm_t(Tensor values, Tensor codes, Tensor blk_ptr, Tensor blk_pad, Tensor units, Tensor x, Tensor? bias, "
      "int m, int k, int block_size, int dim, int activation) -> Tensor");
  // The entries of A . B^T that W stores, in entry order; 0 for padding, which `stored` counts too
  library.def(
      "sddmm(Tensor codes, Tensor blk_ptr, Tensor blk_pad, Tensor units, Tensor a, Tensor b, "
      "int m, int k, int block_size, SymInt stored, int dim) -> Tensor");

  // Kept elements of each block: those with a non-zero mask or, without one, a non-zero weight
  library.def("count(Tensor dense, Tensor? mask, int block_size) -> Tensor");
  // Values and codes of the kept elements; `stored` is the last entry of blk_ptr
  library.def(
      "pack(Tensor dense, Tensor? mask, Tensor blk_ptr, Tensor blk_pad, int block_size, int stored) "
      "-> (Tensor, Tensor)");
  // The same in blocks of 64, with a bitmap in place of codes
  library.def(
      "pack_bitmap(Tensor dense, Tensor? mask, Tensor blk_ptr, Tensor blk_pad, int stored) -> (Tensor, Tensor)");
  // Codes of a bitmap's entries in their order
  library.def("to_codes(Tensor bitmap, Tensor blk_ptr, Tensor blk_pad, int m, int k, int stored) -> Tensor");
  library.def(
      "unpack(Tensor values, Tensor codes, Tensor blk_ptr, Tensor blk_pad, int m, int k, int block_size) -> Tensor");
  // Work units of a pattern, [2, num_units + 1]; host arrays only
  library.def("plan(Tensor blk_ptr, Tensor blk_pad, int mb, int kb) -> Tensor");

  // Y = W . X and the entries of A . B^T, W in compressed sparse rows, see baseline/csr.h: to compare
  // with. Features first, no derivatives. csr_merge and csr_row_swizzle run on CUDA only
  library.def("csr_row_split(Tensor values, Tensor row_ptr, Tensor col_ind, Tensor row_order, Tensor x) -> Tensor");
  library.def("csr_merge(Tensor values, Tensor row_ptr, Tensor col_ind, Tensor row_order, Tensor x) -> Tensor");
  library.def("csr_row_swizzle(Tensor values, Tensor row_ptr, Tensor col_ind, Tensor row_order, Tensor x) -> Tensor");
  library.def("csr_sddmm(Tensor row_ptr, Tensor col_ind, Tensor row_order, Tensor a, Tensor b) -> Tensor");

  library.def("build_info() -> str");
}
