"""What several test files share: matrices on a device, activations in every memory layout, operands, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_csb
from torch_csb import CSBMatrix, ops
from torch_csb.testing import NamedMatrix, compare, expect_sddmm, expect_spmm, expect_spmm_t

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (16, 32, 64, 128, 256)
# Blocks of these sizes with codes, and of 64 with a bitmap.
BLOCKS: tuple[int | str, ...] = (*BLOCK_SIZES, "bitmap")
ACTIVATIONS = (None, "relu", "relu6", "silu", "gelu")


def packing(blocks: int | str | None) -> dict[str, Any]:
    """What CSBMatrix.from_dense and its like are told for one of BLOCKS; None leaves all to them."""
    if blocks is None:
        return {}
    return {"encoding": "bitmap"} if blocks == "bitmap" else {"block_size": blocks, "encoding": "codes"}


def build(
    case: NamedMatrix, dtype: torch.dtype = torch.float32, device: str = "cpu", block_size: int | str | None = None
) -> CSBMatrix:
    mask = case.mask().to(device) if case.explicit_zeros else None
    return CSBMatrix.from_dense(case.dense(dtype, device), mask, **packing(block_size))


def random_matrix(
    m: int, k: int, sparsity: float, dtype: torch.dtype = torch.float32, device: str = "cpu", block_size: int | str = 64
) -> CSBMatrix:
    weight = torch.randn(m, k) * (torch.rand(m, k) >= sparsity)
    return CSBMatrix.from_dense(weight.to(device=device, dtype=dtype), **packing(block_size))


def operands(w: CSBMatrix) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return w.values, w.codes, w.blk_ptr, w.blk_pad, w.units


def call(name: str, w: CSBMatrix, x: Tensor, bias: Tensor | None = None, dim: int = -1, activation: int = 0) -> Tensor:
    """torch.ops.torch_csb.spmm or spmm_t, as the dispatcher sees it."""
    op: Any = getattr(torch.ops.torch_csb, name)
    return op(*operands(w), x, bias, w.m, w.k, w.block_size, dim, activation)


def sddmm_args(w: CSBMatrix, a: Tensor, b: Tensor, dim: int = -1) -> tuple[Any, ...]:
    return *operands(w)[1:], a, b, w.m, w.k, w.block_size, w.values.numel(), dim


def call_sddmm(w: CSBMatrix, a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    return torch.ops.torch_csb.sddmm(*sddmm_args(w, a, b, dim))


def _factors(n: int) -> tuple[int, int]:
    """n as a product of two numbers, as equal as they get."""
    small = max((i for i in range(1, int(n**0.5) + 1) if n % i == 0), default=1)
    return small, n // small


# name: why an op must take it. Each is built by activation() below.
LAYOUTS = {
    "rows": "what nn.Linear passes",
    "batched_rows": "a batch of sequences",
    "row_gaps": "rows of a wider tensor",
    "feature_gaps": "features that are not adjacent: a strided slice of the last dimension",
    "misaligned": "a pointer that no vector load may use",
    "transposed": "features last, memory features first",
    "columns": "X as mathematics writes it, [k, n]",
    "nchw": "an image, batch in the columns",
    "nchw_strided": "a strided 1x1 convolution: x[:, :, ::2, ::2]",
    "nchw_as_nhwc": "NCHW memory seen features last",
    "channels_last": "channels_last memory seen features first",
    "three_levels": "three column dimensions that can't be merged",
    "four_levels": "one more than a kernel's view of memory holds",
    "same_row": "every column is the same memory (stride 0)",
    "same_feature": "every feature is the same memory (stride 0)",
}


def activation(layout: str, features: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, int]:
    """Random activations of the given memory layout, and the dimension that holds their features."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype=dtype, device=device)

    def inside(*shape: int | tuple[int, int]) -> Tensor:
        """A part of a larger tensor: (size, size in memory) a dimension. What lies between is NaN."""
        sizes = [s if isinstance(s, tuple) else (s, s) for s in shape]
        memory = torch.full([size for _, size in sizes], torch.nan, dtype=dtype, device=device)
        view = memory[tuple(slice(size) for size, _ in sizes)]
        return view.copy_(normal(*view.shape))

    outer, inner = _factors(n)
    if layout == "rows":
        return normal(n, features), -1
    if layout == "batched_rows":
        return normal(outer, inner, features), 2
    if layout == "row_gaps":
        return inside(n, (features, features + 3)), -1
    if layout == "feature_gaps":
        return inside(n, features, (1, 2))[:, :, 0], -1
    if layout == "misaligned":
        return normal(n * features + 1)[1:].view(n, features), -1
    if layout == "transposed":
        return normal(features, n).t(), -1
    if layout == "columns":
        return normal(features, n), 0
    if layout == "nchw":
        return normal(outer, features, 1, inner), 1
    if layout == "nchw_strided":
        return inside(1, features, outer, (1, 2), inner, (1, 2))[:, :, :, 0, :, 0], 1
    if layout == "nchw_as_nhwc":
        return normal(outer, features, inner, 1).permute(0, 2, 3, 1), -1
    if layout == "channels_last":
        return normal(outer, inner, 1, features).permute(0, 3, 1, 2), 1
    if layout == "three_levels":
        middle, inner = _factors(inner)
        return inside(outer, (middle, middle + 1), (inner, inner + 1), (features, features + 1)), -1
    if layout == "four_levels":
        (first, second), (third, fourth) = _factors(outer), _factors(inner)
        return inside(first, (second, second + 1), features, (third, third + 1), (fourth, fourth + 1)), 2
    if layout == "same_row":
        return normal(1, features).expand(n, features), -1
    if layout == "same_feature":
        return normal(n, 1).expand(n, features), -1
    raise ValueError(f"unknown layout {layout!r}")


def check_all(
    w: CSBMatrix, layout: str, n: int, bias: bool = False, act: str | None = None, judge: str | None = None
) -> None:
    """The three operators in one layout. sddmm meets it on either side, the other side is contiguous.

    The expectation is computed on the device ``judge``, by default that of W.
    """
    device, case = str(w.device.type), f"{w}, {layout}, n={n}, bias={bias}, {act}"
    there = judge or device
    x, dim = activation(layout, w.k, n, w.dtype, device)
    y, _ = activation(layout, w.m, n, w.dtype, device)
    b, c = (torch.randn(w.m).to(x), torch.randn(w.k).to(x)) if bias else (None, None)
    products = (
        ("spmm", ops.spmm, expect_spmm, x, b),
        ("spmm_t", ops.spmm_t, expect_spmm_t, y, c),
    )
    known = w.to(there)
    for name, op, expect, operand, addend in products:
        got = op(w, operand, addend, activation=act, dim=dim)
        assert got.is_contiguous(), case
        addend = addend if addend is None else addend.to(there)
        compare(got.to(there), expect(known, operand.to(there), addend, act, dim), f"{name} {case}")
    for left, right in ((y.contiguous(), x), (y, x.contiguous())):
        got = ops.sddmm(w, left, right, dim=dim)
        compare(got.to(there), expect_sddmm(known, left.to(there), right.to(there), dim), f"sddmm {case}")


def run_script(path: str, *arguments: str, **environment: str) -> str:
    """Runs a Python file in a process of its own, with the package that this process tests, and returns its output."""
    package = str(Path(torch_csb.__file__).resolve().parents[1])
    python_path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": python_path, **environment}
    done = subprocess.run(
        [sys.executable, path, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
