"""What tests, examples and benchmarks share: named matrices and a judge with derived bounds."""

from torch_csb.testing.compare import Expected, compare, expect_sddmm, expect_spmm, expect_spmm_t
from torch_csb.testing.matrices import MATRICES, NamedMatrix, matrix, read_smtx, uniform

__all__ = [
    "MATRICES",
    "Expected",
    "NamedMatrix",
    "compare",
    "expect_sddmm",
    "expect_spmm",
    "expect_spmm_t",
    "matrix",
    "read_smtx",
    "uniform",
]
