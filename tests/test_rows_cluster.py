"""float32 products that leave a GPU idle: thread blocks of a cluster share a strip."""

from __future__ import annotations

import pytest
import torch
from cases import check_all, random_matrix

from torch_csb import CSBMatrix, explain, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="clusters are of Hopper"
)


def joins(w: CSBMatrix, n: int, step: int = 0) -> bool:
    return "cluster" in explain(w, n).steps[step].reason


@pytest.mark.parametrize("layout", ["rows", "row_gaps", "columns", "nchw", "misaligned", "three_levels"])
@pytest.mark.parametrize("n", [17, 64, 65, 130])
@pytest.mark.parametrize(("m", "k"), [(130, 1000), (512, 512), (1000, 70), (64, 129)])
def test_every_layout(m: int, k: int, layout: str, n: int) -> None:
    w = random_matrix(m, k, 0.9, device="cuda")
    assert joins(w, n)
    check_all(w, layout, n, bias=True, act="relu")


@pytest.mark.parametrize("rows", [slice(7, 8), slice(None), slice(100, 300)])
@pytest.mark.parametrize("columns", [slice(7, 8), slice(None), slice(0, 70)])
def test_blocks_and_strips_without_an_entry(rows: slice, columns: slice) -> None:
    weight = torch.zeros(512, 512)
    weight[rows, columns] = torch.randn(512, 512)[rows, columns]
    check_all(CSBMatrix.from_dense(weight.cuda()), "rows", 100, bias=True, act="silu")


@pytest.mark.parametrize(("m", "k", "step"), [(64, 2048, 0), (2048, 64, 1)])
def test_blocks_of_more_entries_than_a_stage_holds_go_round_the_ring(m: int, k: int, step: int) -> None:
    w = random_matrix(m, k, 0.1, device="cuda")
    assert joins(w, 130, step)
    check_all(w, "rows", 130)


def test_the_bits_are_the_same_every_time() -> None:
    w = random_matrix(512, 512, 0.9, device="cuda")
    assert joins(w, 256)
    x = torch.randn(256, 512, device="cuda")
    first = ops.spmm(w, x), ops.spmm_t(w, x)
    for _ in range(50):
        assert torch.equal(ops.spmm(w, x), first[0]) and torch.equal(ops.spmm_t(w, x), first[1])
