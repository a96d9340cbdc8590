"""What the tests and the sanitizer run share about the CSR baselines."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torch_csb import CSBMatrix, baselines, reference
from torch_csb.baselines import CSRMatrix
from torch_csb.testing import Expected, compare, expect_sddmm, expect_spmm

SPMM = {
    "cpu": (baselines.row_split,),
    "cuda": (baselines.row_split, baselines.merge, baselines.row_swizzle),
}


def shifted(tensor: Tensor) -> Tensor:
    """The same contiguous tensor one element further in memory, where no vector load may begin. NaN or a negative index
    lies around it."""
    around = torch.nan if tensor.is_floating_point() else -1
    memory = torch.full((tensor.numel() + 2,), around, dtype=tensor.dtype, device=tensor.device)
    return memory[1:-1].view(tensor.shape).copy_(tensor)


def shifted_matrix(w: CSRMatrix) -> CSRMatrix:
    return w.with_arrays(*(shifted(array) for array in w.arrays()))


def in_csr_order(w: CSBMatrix, expect: Expected) -> Expected:
    """What belongs to each entry of a CSBMatrix, in the order of the same matrix in CSR."""
    at = reference.decode(w)
    order = at.index[(at.row * w.k + at.col).argsort()]
    return replace(expect, value=expect.value[order], bound=expect.bound[order])


def check_all(w: CSBMatrix, n: int, misaligned: bool = False, judge: str | None = None) -> None:
    """Every baseline that the device of ``w`` has, on that matrix; the expectation is computed on ``judge``."""
    device = str(w.device.type)
    there = judge or device
    # Sorting and validating on the GPU would take the sanitizer longer than the kernels under test.
    csr = CSRMatrix.from_csb(w.to(there)).to(device)
    x, y = (torch.randn(size, n).to(device=device, dtype=w.dtype) for size in (w.k, w.m))
    if misaligned:
        csr, x, y = shifted_matrix(csr), shifted(x), shifted(y)
    case = f"{csr}, n={n}, misaligned={misaligned}"
    known = w.to(there)
    expect = expect_spmm(known, x.to(there), dim=0)
    for multiply in SPMM[device]:
        got = multiply(csr, x)
        assert got.is_contiguous(), case
        compare(got.to(there), expect, f"{multiply.__name__} {case}")
    expect = in_csr_order(known, expect_sddmm(known, y.to(there), x.to(there), dim=0))
    compare(baselines.sddmm(csr, y, x).to(there), expect, f"sddmm {case}")
