"""The CPU kernels of each instruction set. Which one runs is read once, so each gets a process.

Run as a script, this file is what those processes do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, LAYOUTS, build, check_all, random_matrix, run_script

from torch_csb.testing import matrix

SETS = ("default", "avx2", "avx512")


def flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def run_cases() -> None:
    torch.manual_seed(0)
    print(torch.ops.torch_csb.build_info())
    for dtype in DTYPES:
        for block_size in BLOCK_SIZES:
            w = build(matrix("edge_65x63"), dtype, block_size=block_size)
            for n in (1, 2, 3, 5, 8, 17, 33):
                check_all(w, "rows", n, bias=True, act="gelu")
                check_all(w, "columns", n, bias=True, act="silu")
        for layout in LAYOUTS:
            check_all(build(matrix("uniform_90"), dtype, block_size=64), layout, 30, bias=True, act="relu6")
        for n in (1, 40):
            check_all(random_matrix(96, 1100, 0.5, dtype), "rows", n)
            check_all(build(matrix("full"), dtype, block_size=256), "nchw", n)


@pytest.mark.parametrize("capability", SETS)
def test_every_instruction_set(capability: str) -> None:
    if capability == "avx2" and "avx2" not in flags() or capability == "avx512" and "avx512f" not in flags():
        pytest.skip(f"this processor has no {capability}")
    output = run_script(__file__, ATEN_CPU_CAPABILITY=capability)
    assert f"cpu={capability}" in output


if __name__ == "__main__":
    run_cases()
