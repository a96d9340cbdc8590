"""When dW in float32 goes region by region, and how the planner fills a chip with few regions."""

from __future__ import annotations

import pytest

from torch_csb import _plan

SMS = 132
MIB = 2**20


def sddmm(m: int, k: int, n: int, density: float, **given) -> _plan.Choice:
    given = {"dtype": "float32", "block_size": 64, **given}
    offer = _plan.PanelOffer(True, m, k, int(density * m * k))
    return _plan.choose_cuda_sddmm(num_units=384, columns=n, multiprocessors=SMS, offer=offer, **given)


def test_regions_take_what_is_sparse_and_panels_the_rest() -> None:
    assert sddmm(4096, 4096, 4096, 0.1).kernel == "region"
    assert sddmm(4096, 4096, 4096, 0.2).kernel == "panel"
    # Too small for panels: regions at any density.
    assert sddmm(128, 512, 196, 1.0).kernel == "region"


@pytest.mark.parametrize(
    "given", [{"dtype": "float64"}, {"block_size": 128}, {"region": False}, {"shared_bytes": 99 * 1024}]
)
def test_what_regions_cannot_do_is_left_to_gather(given: dict) -> None:
    assert sddmm(512, 512, 196, 0.1, **given).kernel == "gather"


def test_many_regions_are_not_cut() -> None:
    choice = sddmm(4096, 4096, 4096, 0.1)
    assert choice.split == 1 and "fill the chip" in choice.reason


def test_few_regions_are_cut_into_as_many_runs_of_columns_as_fill_the_chip() -> None:
    assert sddmm(64, 147, 802_816, 0.1).split == SMS
    assert sddmm(512, 512, 4096, 0.01).split == SMS // 4
    # A run has 32 columns or more.
    assert sddmm(64, 147, 100, 0.1).split == 3
    assert sddmm(64, 147, 31, 0.1).split == 1


def test_a_dense_region_is_first_shared_by_its_entries() -> None:
    """32,768 entries are ten passes of 3,400: ten thread blocks take one each, three runs of columns for 132."""
    assert sddmm(512, 512, 200, 0.5).split == SMS // (4 * 10)


@pytest.mark.parametrize(("dtype", "item", "block_size"), [("float32", 4, 64), ("float64", 8, 64), ("bfloat16", 4, 64)])
@pytest.mark.parametrize(("m", "k"), [(64, 64), (256, 1024), (2048, 2048)])
@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_the_sums_of_cut_columns_take_32_mib_at_most(dtype, item, block_size, m, k, density) -> None:
    offer = _plan.PanelOffer(False, m, k, int(density * m * k))
    for units in (1, 20, 384):
        choice = _plan.choose_cuda_sddmm(dtype, block_size, units, 10**6, SMS, offer)
        assert choice.split == 1 or choice.split * int(density * m * k) * item <= 32 * MIB


def test_rows_ask_for_shared_memory_that_chips_before_hopper_may_lack() -> None:
    """A thread block has 163 KiB on an A100, 99 KiB on an RTX 3090."""

    def spmm(n: int, kib: int) -> _plan.Choice:
        return _plan.choose_cuda_spmm("float32", 64, 64, 384, n, SMS, hopper=False, shared_bytes=kib * 1024)

    assert (spmm(4096, 227).kernel, spmm(4096, 227).tile_n) == ("rows", 256)
    assert (spmm(4096, 163).kernel, spmm(4096, 163).tile_n) == ("rows", 64)
    assert spmm(4096, 99).kernel == "gather"
