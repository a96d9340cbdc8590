"""float32 products that leave a GPU idle: thread blocks of a cluster share a strip."""

from __future__ import annotations

import pytest
import torch
from cases import check_all, random_matrix

from torch_csb import CSBMatrix, explain, ops

_plan = pytest.importorskip("torch_csb._plan")
SMS = 132


def choose(strips: int, blocks_per_strip: int, n: int, num_units: int, **given) -> _plan.Choice:
    given = {"blocks_per_strip": blocks_per_strip, **given}
    return _plan.choose_cuda_spmm("float32", 64, strips, num_units, n, SMS, **given)


def test_clusters_are_as_large_as_fill_the_chip_twice() -> None:
    sizes = [choose(strips, 8, n, 384).cluster for strips, n in ((8, 256), (32, 256), (64, 256), (64, 64), (128, 64))]
    assert sizes == [8, 2, 1, 4, 2]
    assert choose(8, 3, 256, 8).cluster == 2  # a thread block has one block or more


@pytest.mark.parametrize(("num_units", "most"), [(384, 4), (383, 2)])
def test_long_strips_are_cut_into_units(num_units: int, most: int) -> None:
    for blocks, cluster in ((8 * most, 8), (8 * most + 1, 1)):
        choice = choose(8, blocks, 256, num_units)
        assert (choice.cluster, choice.split) == (cluster, cluster == 1)


def test_chips_before_hopper_have_no_clusters() -> None:
    assert (choose(8, 8, 256, 384, hopper=False).cluster, choose(8, 8, 256, 384, hopper=False).split) == (1, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="clusters are of a GPU")
class TestOnGpu:
    @pytest.mark.parametrize("layout", ["rows", "row_gaps", "columns", "nchw", "misaligned", "three_levels"])
    @pytest.mark.parametrize("n", [17, 64, 65, 130])
    @pytest.mark.parametrize(("m", "k"), [(130, 1000), (512, 512), (1000, 70), (64, 129)])
    def test_every_layout(self, m: int, k: int, layout: str, n: int) -> None:
        check_all(random_matrix(m, k, 0.9, device="cuda"), layout, n, bias=True, act="relu")

    def test_strips_of_every_kind(self) -> None:
        """One full row, one full column, blocks and strips without an entry."""
        for rows, columns in ((slice(7, 8), slice(None)), (slice(None), slice(7, 8)), (slice(100, 300), slice(0, 70))):
            weight = torch.zeros(512, 512)
            weight[rows, columns] = torch.randn(512, 512)[rows, columns]
            w = CSBMatrix.from_dense(weight.cuda())
            check_all(w, "rows", 100, bias=True, act="silu")

    def test_the_bits_are_the_same_every_time(self) -> None:
        w = random_matrix(512, 512, 0.9, device="cuda")
        assert "cluster" in explain(w, 256).steps[0].reason
        x = torch.randn(256, 512, device="cuda")
        first = ops.spmm(w, x), ops.spmm_t(w, x)
        for _ in range(50):
            assert torch.equal(ops.spmm(w, x), first[0]) and torch.equal(ops.spmm_t(w, x), first[1])
