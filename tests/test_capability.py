"""The CPU kernels of each instruction set. Which one runs is read once, so each gets a process.

Run as a script, this file is what those processes do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import BLOCKS, DTYPES, LAYOUTS, build, check_all, random_matrix, run_script

from torch_csb import CSBMatrix, ops
from torch_csb.testing import matrix

SETS = ("default", "avx2", "avx512")


def flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def row_lengths(most: int, dtype: torch.dtype) -> CSBMatrix:
    """Rows of 0 to ``most`` entries in every block, side by side: each kernel for what is left of a row is met."""
    kept = torch.arange(300)[:, None] * 7 % (most + 1)
    mask = torch.cat([torch.rand(300, 256).argsort(1) < kept for _ in range(2)], dim=1)[:, :500]
    return CSBMatrix.from_dense(torch.randn(300, 500).to(dtype) * mask, block_size=256)


def check_threads(w: CSBMatrix, n: int) -> None:
    """Units or whole strips, one thread or three: the same bits."""
    x, y = torch.randn(n, w.k).to(w.dtype), torch.randn(n, w.m).to(w.dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append((ops.spmm(w, x), ops.spmm_t(w, y), ops.spmm(w, x.t(), dim=0), ops.sddmm(w, y, x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True)), f"{w}, n={n}"


def run_cases() -> None:
    torch.manual_seed(0)
    print(torch.ops.torch_csb.build_info())
    for dtype in DTYPES:
        for blocks in BLOCKS:
            w = build(matrix("edge_65x63"), dtype, block_size=blocks)
            for n in (1, 2, 3, 5, 8, 17, 33):
                check_all(w, "rows", n, bias=True, act="gelu")
                check_all(w, "columns", n, bias=True, act="silu")
        for layout in LAYOUTS:
            check_all(build(matrix("uniform_90"), dtype, block_size=64), layout, 30, bias=True, act="relu6")
        for n in (1, 40):
            check_all(random_matrix(96, 1100, 0.5, dtype), "rows", n)
            check_all(build(matrix("full"), dtype, block_size=256), "nchw", n)
            # A row of one entry comes back in each quarter of a block, often among sixteen rows.
            check_all(random_matrix(130, 140, 0.98, dtype, block_size="bitmap"), "rows", n)
        for most in (15, 45):
            for n in (1, 4, 16, 64, 72):  # 72: tiles that are read where they lie in a wider X
                check_all(row_lengths(most, dtype), "columns", n)
        # More input features than packed tiles stay: strips share the tiles that pass.
        check_all(random_matrix(4400, 4400, 0.995, dtype), "rows", 64)
        for n in (1, 64):
            check_threads(random_matrix(512, 1024, 0.9, dtype), n)
        check_threads(random_matrix(2304, 4400, 0.99, dtype), 64)


@pytest.mark.parametrize("capability", SETS)
def test_every_instruction_set(capability: str) -> None:
    if capability == "avx2" and "avx2" not in flags() or capability == "avx512" and "avx512f" not in flags():
        pytest.skip(f"this processor has no {capability}")
    output = run_script(__file__, ATEN_CPU_CAPABILITY=capability)
    assert f"cpu={capability}" in output


if __name__ == "__main__":
    run_cases()
