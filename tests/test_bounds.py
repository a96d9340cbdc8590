"""The CPU kernels at the borders of their arrays, on each instruction set.

Run as a script, this file is what the processes of these tests do; `make asan` runs it too.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, activation, packing, run_script
from guarded import guarded, guarded_matrix
from test_capability import SETS, flags

import torch_csb
from torch_csb import CSBMatrix, ops
from torch_csb.testing import compare, expect_sddmm, expect_spmm, expect_spmm_t

SIDES = ("begin", "end")
# Odd sizes, so that rows, columns and blocks end in the middle of vectors and tiles.
SIZES = ((1, 1, 16), (37, 53, 16), (67, 129, 64), (33, 300, 256), (67, 129, "bitmap"))
DENSITIES = (0.0, 0.3, 1.0)


def matrix(m: int, k: int, blocks: int | str, density: float, dtype: torch.dtype) -> CSBMatrix:
    kept = torch.rand(m, k) < density
    return CSBMatrix.from_dense(torch.randn(m, k, dtype=dtype), kept, **packing(blocks))


def check(w: CSBMatrix, n: int, layout: str, side: str) -> None:
    case = f"{w}, {layout}, n={n}, {side}"
    x, dim = activation(layout, w.k, n, w.dtype, "cpu")
    y, _ = activation(layout, w.m, n, w.dtype, "cpu")
    b, c = torch.randn(w.m).to(w.dtype), torch.randn(w.k).to(w.dtype)
    there, x_there, y_there = guarded_matrix(w, side), guarded(x, side), guarded(y, side)
    got = ops.spmm(there, x_there, guarded(b, side), activation="relu", dim=dim)
    compare(got, expect_spmm(w, x, b, "relu", dim), f"spmm {case}")
    got = ops.spmm_t(there, y_there, guarded(c, side), dim=dim)
    compare(got, expect_spmm_t(w, y, c, None, dim), f"spmm_t {case}")
    compare(ops.sddmm(there, y_there, x_there, dim=dim), expect_sddmm(w, y, x, dim), f"sddmm {case}")


def run_cases() -> None:
    torch.manual_seed(0)
    print(torch.ops.torch_csb.build_info())
    for dtype in DTYPES:
        for m, k, blocks in SIZES:
            for density in DENSITIES:
                w = matrix(m, k, blocks, density, dtype)
                for side in SIDES:
                    there = guarded_matrix(w, side)
                    dense = guarded(w.to_dense(), side)
                    assert torch.equal(there.to_dense(), dense)
                    again = CSBMatrix.from_dense(dense, guarded(dense != 0, side), **packing(blocks))
                    assert torch.equal(again.to_dense(), dense)
        # Every count of columns at least once on each side, in each layout.
        for n in (*range(1, 41), 72, 136):
            for i, (m, k, blocks) in enumerate(SIZES):
                w = matrix(m, k, blocks, DENSITIES[(n + i) % 3], dtype)
                check(w, n, "columns" if (n + i) % 2 else "rows", SIDES[n // 2 % 2])
                check(w, n, "nchw" if (n + i) % 2 else "misaligned", SIDES[(n // 2 + 1) % 2])
    print("right")


@pytest.mark.parametrize("capability", SETS)
def test_no_access_outside_any_array(capability: str) -> None:
    if capability == "avx2" and "avx2" not in flags() or capability == "avx512" and "avx512f" not in flags():
        pytest.skip(f"this processor has no {capability}")
    output = run_script(__file__, ATEN_CPU_CAPABILITY=capability)
    assert f"cpu={capability}" in output and output.endswith("right\n")


@pytest.mark.parametrize("side", SIDES)
def test_one_element_further_ends_the_process(side: str) -> None:
    package = str(Path(torch_csb.__file__).resolve().parents[1])
    # A sanitizer would take the fault that is wanted here for one to report.
    environment = {**os.environ, "PYTHONPATH": package, "ASAN_OPTIONS": "handle_segv=0:detect_leaks=0"}
    done = subprocess.run([sys.executable, __file__, side], capture_output=True, text=True, env=environment)
    assert done.stdout == "1000.0\n" and done.returncode != 0, done.stderr


def reach_outside(side: str) -> None:
    x = guarded(torch.ones(1000), side)
    print(x.sum().item(), flush=True)
    outside = x.data_ptr() - 4 if side == "begin" else x.data_ptr() + 4000
    print(ctypes.c_float.from_address(outside).value)


if __name__ == "__main__":
    reach_outside(sys.argv[1]) if sys.argv[1:] else run_cases()
