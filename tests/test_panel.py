"""Products with panels of W ahead of cuBLAS: right in every layout, at every density, and never much memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product

import pytest
import torch
from cases import activation, call, operands, random_matrix
from torch import Tensor

from torch_csb import CSBMatrix, ops, reference
from torch_csb.testing import Expected, compare, expect_sddmm, expect_spmm, expect_spmm_t

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd, and large enough in 16 bits too.
M, K, N = 1291, 1537, 2400
SPARSITY = 0.7  # above, float32 takes the entries alone
MIB = 2**20


def allocated(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """A result, and the bytes that were asked for beside it, freed or not."""

    def total() -> int:
        return torch.cuda.memory_stats()["requested_bytes.all.allocated"]

    before = total()
    result = run()
    return result, total() - before - result.numel() * result.element_size()


def by_panels(run: Callable[[], Tensor], w: CSBMatrix) -> Tensor:
    """The result of a call that made one panel, at least 256 of W's rows or columns, and nothing else."""
    torch.mm(*torch.ones(2, 8, 8, device="cuda"))  # torch keeps cuBLAS's workspace
    result, extra = allocated(run)
    assert 256 * min(w.m, w.k) * w.values.element_size() <= extra <= 32 * MIB
    return result


def rounded_twice(expect: Expected, w: Tensor, x: Tensor, bias: Tensor | None, dim: int) -> Expected:
    """cuBLAS may round a 16-bit product before it adds the bias, and silu and gelu always follow a rounded product."""
    unit = torch.finfo(expect.dtype).eps / 2
    between = reference.apply(w.double(), x.double(), None, None, dim).abs()
    if bias is not None:
        shape = [1] * x.dim()
        shape[dim] = -1
        between = between + bias.double().abs().view(shape)
    return dataclasses.replace(expect, bound=expect.bound + 1.2 * unit * between)


def check(w: CSBMatrix, layout: str, n: int, bias: bool = False, act: str | None = None, sddmm: bool = True) -> None:
    x, dim = activation(layout, w.k, n, w.dtype, "cuda")
    y, _ = activation(layout, w.m, n, w.dtype, "cuda")
    b, c = (torch.randn(w.m).to(x), torch.randn(w.k).to(x)) if bias else (None, None)
    case = f"{w}, {layout}, bias={bias}, {act}"
    dense = reference.to_dense(w)
    for op, expect, weight, operand, addend in (
        (ops.spmm, expect_spmm, dense, x, b),
        (ops.spmm_t, expect_spmm_t, dense.mT, y, c),
    ):
        got = by_panels(lambda op=op, a=operand, b=addend: op(w, a, b, activation=act, dim=dim), w)
        want = expect(w, operand, addend, act, dim)
        if w.dtype != torch.float32 and (bias or act in ("silu", "gelu")):
            want = rounded_twice(want, weight, operand, addend, dim)
        compare(got, want, f"{op.__name__} {case}")
    if sddmm and w.nnz:
        compare(by_panels(lambda: ops.sddmm(w, y, x, dim=dim), w), expect_sddmm(w, y, x, dim), f"sddmm {case}")


@pytest.mark.parametrize("layout", ["rows", "row_gaps", "misaligned", "columns", "transposed", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_matrix_of_columns(dtype: torch.dtype, layout: str) -> None:
    n = 2 * 1201 if layout == "channels_last" else N  # whose result has images of 1201 columns
    check(random_matrix(M, K, SPARSITY, dtype, "cuda"), layout, n, sddmm=layout != "channels_last")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_of_images(dtype: torch.dtype) -> None:
    """In float32 alone the images' products can be added up without rounding between them."""
    w = random_matrix(M, K, SPARSITY, dtype, "cuda")
    check(w, "nchw", 2 * 1201, sddmm=False)
    x, y = torch.randn(6, K, 20, 20).to("cuda", dtype), torch.randn(6, M, 20, 20).to("cuda", dtype)
    got = by_panels(lambda: ops.spmm(w, x, dim=1), w)
    compare(got, expect_spmm(w, x, dim=1), "images")
    got = by_panels(lambda: ops.sddmm(w, y, x, dim=1), w) if dtype == torch.float32 else ops.sddmm(w, y, x, dim=1)
    compare(got, expect_sddmm(w, y, x, 1), "images")


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    ("sparsity", "dtype"),
    [*product((0.0, 0.5, SPARSITY), DTYPES[:2]), (0.85, torch.bfloat16), (1.0, torch.bfloat16)],
    ids=str,
)
def test_densities_and_block_sizes(sparsity: float, dtype: torch.dtype, block_size: int) -> None:
    w = random_matrix(M, K, sparsity, dtype, "cuda", block_size)
    check(w, "rows", N)


@pytest.mark.parametrize("sparsity", [0.985, 0.999])
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_few_entries(sparsity: float, block_size: int) -> None:
    check(random_matrix(M, K, sparsity, torch.bfloat16, "cuda", block_size), "rows", N)


@pytest.mark.parametrize(("layout", "n"), [("rows", N), ("columns", N), ("nchw", 2 * 1201)])
@pytest.mark.parametrize("act", [None, "relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bias_and_activation(dtype: torch.dtype, act: str | None, layout: str, n: int) -> None:
    check(random_matrix(M, K, SPARSITY, dtype, "cuda"), layout, n, bias=True, act=act, sddmm=False)


@pytest.mark.parametrize(("m", "k"), [(257, 9001), (9001, 300), (2048, 2048)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, m: int, k: int) -> None:
    w = random_matrix(m, k, 0.8, dtype, "cuda")
    x, y = torch.randn(N, k).to("cuda", dtype), torch.randn(N, m).to("cuda", dtype)
    compare(ops.spmm(w, x), expect_spmm(w, x), f"spmm {w}")
    compare(ops.spmm_t(w, y), expect_spmm_t(w, y), f"spmm_t {w}")
    compare(ops.sddmm(w, y, x), expect_sddmm(w, y, x), f"sddmm {w}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_a_large_matrix(dtype: torch.dtype) -> None:
    """A dense copy would take 128 or 256 MiB."""
    w = CSBMatrix.from_dense((torch.randn(8192, 8192) * (torch.rand(8192, 8192) > SPARSITY)).to("cuda", dtype))
    x = torch.randn(1024, 8192).to("cuda", dtype)
    for run in (lambda: ops.spmm(w, x), lambda: ops.spmm_t(w, x), lambda: ops.sddmm(w, x, x)):
        by_panels(run, w)


def test_padding_gets_a_zero_gradient() -> None:
    w = random_matrix(M, K, 0.95, torch.bfloat16, "cuda")
    x, y = torch.randn(N, K).to("cuda", w.dtype), torch.randn(N, M).to("cuda", w.dtype)
    torch.full((64 * MIB,), torch.nan, device="cuda")  # what the allocator hands out next
    values = ops.sddmm(w, y, x)
    padding = torch.ones_like(values, dtype=torch.bool)
    padding[reference.decode(w).index] = False
    assert padding.any() and not values[padding].any()


def test_true_float32_and_float32_sums_whatever_torch_allows() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        w = random_matrix(M, K, 0.5, torch.float32, "cuda")
        x, y = torch.randn(N, K, device="cuda"), torch.randn(N, M, device="cuda")
        got = ops.spmm(w, x), ops.spmm_t(w, y), ops.sddmm(w, y, x)
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    for result, want in zip(got, (expect_spmm(w, x), expect_spmm_t(w, y), expect_sddmm(w, y, x)), strict=True):
        compare(result, want, "TF32 allowed")


def test_tensors_that_require_grad_and_autocast() -> None:
    """Called by the dispatcher itself, below autograd.py: library products with out= refuse such tensors."""
    w = random_matrix(M, K, 0.5, torch.float32, "cuda")
    x, y = torch.randn(N, K, device="cuda"), torch.randn(N, M, device="cuda")
    want = call("spmm", w, x)
    values = w.values.clone().requires_grad_()
    rest = (*operands(w)[1:], x.clone().requires_grad_(), None, w.m, w.k, w.block_size, -1, 0)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(torch.ops.torch_csb.spmm(values, *rest), want)
    x.requires_grad_()
    ops.spmm(w, x).backward(y)
    compare(x.grad, expect_spmm_t(w, y), "gradient")


def test_same_bits_in_a_hundred_runs_and_in_a_graph() -> None:
    w = random_matrix(M, K, 0.8, torch.bfloat16, "cuda")
    x, y = torch.randn(N, K).to("cuda", w.dtype), torch.randn(N, M).to("cuda", w.dtype)

    def run() -> list[Tensor]:
        return [ops.spmm(w, x, activation="relu"), ops.spmm_t(w, y), ops.sddmm(w, y, x)]

    first = run()
    assert all(all(map(torch.equal, run(), first)) for _ in range(100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        x.normal_()
        y.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, run()))
