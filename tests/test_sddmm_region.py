"""dW in float32 on a GPU, region by region: passes, classes of columns, shares, runs of columns and odd layouts."""

from __future__ import annotations

import pytest
import torch
from cases import activation, call_sddmm, random_matrix
from torch import Tensor

from torch_csb import CSBMatrix, explain, ops
from torch_csb.testing import compare, expect_sddmm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on a GPU")


def check(w: CSBMatrix, n: int, layout: str = "rows") -> Tensor:
    assert explain(w, n).steps[2].kernel == "region"
    a, dim = activation(layout, w.m, n, torch.float32, "cuda")
    b, _ = activation(layout, w.k, n, torch.float32, "cuda")
    got = ops.sddmm(w, a, b, dim=dim)
    compare(got, expect_sddmm(w, a, b, dim), f"{w}, {layout}, n={n}")
    return got


@pytest.mark.parametrize("layout", ["rows", "nchw", "columns", "misaligned", "feature_gaps", "channels_last"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 144])
def test_every_layout_and_number_of_columns(layout: str, n: int) -> None:
    check(random_matrix(300, 520, 0.9, device="cuda"), n, layout)


@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 300), (256, 256), (257, 255), (300, 5), (64, 1027)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_every_size_and_density(m: int, k: int, sparsity: float) -> None:
    check(random_matrix(m, k, sparsity, device="cuda"), 70)


@pytest.mark.parametrize("columns", ["even", "odd", "one", "last"])
def test_columns_of_one_class(columns: str) -> None:
    """Entries that all stand in the same half of the banks fill only half of the groups of lanes."""
    kept = {"even": slice(0, None, 2), "odd": slice(1, None, 2), "one": slice(3, 4), "last": slice(511, 512)}
    keep = torch.zeros(512, dtype=torch.bool)
    keep[kept[columns]] = True
    weight = torch.randn(512, 512) * keep
    check(CSBMatrix.from_dense(weight.cuda()), 100)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(255, 257), slice(100, 400)])
def test_full_rows(rows: slice) -> None:
    weight = torch.zeros(512, 512)
    weight[rows] = torch.randn(512, 512)[rows]
    check(CSBMatrix.from_dense(weight.cuda()), 100)


def test_no_entries_at_all() -> None:
    w = CSBMatrix.from_dense(torch.zeros(300, 300, device="cuda"))
    assert ops.sddmm(w, torch.randn(9, 300, device="cuda"), torch.randn(9, 300, device="cuda")).numel() == 0


@pytest.mark.parametrize("n", [4096, 50_000])
def test_runs_of_columns_are_added_up(n: int) -> None:
    w = random_matrix(64, 147, 0.9, device="cuda")
    assert explain(w, n).steps[2].split > 16
    check(w, n)


def test_the_bits_are_the_same_every_time_and_wherever_an_entry_stands() -> None:
    w = random_matrix(700, 600, 0.97, device="cuda")
    a, b = torch.randn(900, 700, device="cuda"), torch.randn(900, 600, device="cuda")
    got = [call_sddmm(w, a, b) for _ in range(20)]
    assert all(torch.equal(got[0], other) for other in got[1:])
    half = CSBMatrix.from_dense(w.to_dense() * (torch.arange(700, device="cuda") % 2 == 0)[:, None])
    assert explain(half, 900).steps[2].split == explain(w, 900).steps[2].split
    kept = w.with_values(got[0]).to_dense()[::2]
    assert torch.equal(half.with_values(call_sddmm(half, a, b)).to_dense()[::2], kept * (half.to_dense()[::2] != 0))


def test_padding_has_the_gradient_zero() -> None:
    w = random_matrix(130, 70, 0.97, device="cuda")
    got = check(w, 64)
    assert (~w.is_entry).any() and not got[~w.is_entry].any()
