"""16-bit products of few columns that read a bitmap on a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import check_all, random_matrix

from torch_csb import CSBMatrix, explain, ops
from torch_csb.testing import compare, expect_spmm, expect_spmm_t

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on a GPU")


def check(w: CSBMatrix, n: int) -> None:
    products = ((ops.spmm, expect_spmm, w.k), (ops.spmm_t, expect_spmm_t, w.m))
    for (product, expect, features), step in zip(products, explain(w, n).steps[:2], strict=True):
        assert step.kernel == "bitmap"
        x = torch.randn(n, features).to(w.device, w.dtype)
        compare(product(w, x), expect(w, x), f"{w}, {step.operator}, n={n}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", range(1, 17))
def test_every_number_of_columns(dtype: torch.dtype, n: int) -> None:
    check(random_matrix(200, 328, 0.5, dtype, "cuda", "bitmap"), n)


@pytest.mark.parametrize(("m", "k"), [(8, 8), (64, 64), (72, 1000), (1000, 72), (2048, 2056)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999, 1.0])
def test_every_size_and_density(m: int, k: int, sparsity: float) -> None:
    check(random_matrix(m, k, sparsity, torch.bfloat16, "cuda", "bitmap"), 8)


@pytest.mark.parametrize(("m", "k"), [(64, 8192), (8192, 64)])
def test_full_blocks_take_turns_in_the_ring_with_empty_ones(m: int, k: int) -> None:
    weight = torch.randn(m, k)
    weight *= (torch.arange(m)[:, None] // 64 + torch.arange(k) // 64) % 3 > 0
    for n in (1, 16):
        check(CSBMatrix.from_dense(weight.cuda().half(), encoding="bitmap"), n)


def test_what_stands_behind_a_value_is_never_multiplied() -> None:
    """Every element reads a value and drops it where it has none: infinities must not reach their neighbours."""
    weight = torch.zeros(128, 128, dtype=torch.bfloat16, device="cuda")
    weight[::2, ::3] = float("inf")
    w = CSBMatrix.from_dense(weight, encoding="bitmap")
    x = torch.ones(4, 128, dtype=torch.bfloat16, device="cuda")
    y, y_t = ops.spmm(w, x), ops.spmm_t(w, x)
    assert y[:, ::2].isinf().all() and (y[:, 1::2] == 0).all()
    assert y_t[:, ::3].isinf().all() and (y_t[:, 1::3] == 0).all() and (y_t[:, 2::3] == 0).all()


@pytest.mark.parametrize("layout", ["columns", "nchw", "misaligned", "row_gaps", "feature_gaps", "three_levels"])
def test_layouts_that_it_cannot_read_are_right_too(layout: str) -> None:
    for n in (1, 9):
        check_all(random_matrix(130, 200, 0.5, torch.bfloat16, "cuda", "bitmap"), layout, n, bias=True, act="gelu")


def test_the_bits_are_the_same_every_time() -> None:
    w = random_matrix(1024, 2048, 0.5, torch.bfloat16, "cuda", "bitmap")
    x, x_t = torch.randn(8, 2048, device="cuda").bfloat16(), torch.randn(8, 1024, device="cuda").bfloat16()
    first = ops.spmm(w, x), ops.spmm_t(w, x_t)
    for _ in range(100):
        assert torch.equal(ops.spmm(w, x), first[0]) and torch.equal(ops.spmm_t(w, x_t), first[1])
