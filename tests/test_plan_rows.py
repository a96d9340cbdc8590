"""When thread blocks of a cluster share a strip in float32, and how many."""

from __future__ import annotations

import pytest

from torch_csb import _plan

SMS = 132


def choose(strips: int, blocks_per_strip: int, n: int, num_units: int = 384, **given) -> _plan.Choice:
    given = {"blocks_per_strip": blocks_per_strip, **given}
    return _plan.choose_cuda_spmm("float32", 64, strips, num_units, n, SMS, **given)


@pytest.mark.parametrize(
    ("strips", "blocks", "n", "cluster"),
    [(8, 8, 256, 8), (32, 8, 256, 2), (64, 8, 64, 4), (128, 8, 64, 2), (8, 3, 256, 2)],
)
def test_clusters_fill_the_chip_at_most_twice_and_a_thread_block_has_a_block(strips, blocks, n, cluster) -> None:
    choice = choose(strips, blocks, n)
    assert (choice.kernel, choice.tile_n, choice.split, choice.cluster) == ("rows", 64, False, cluster)
    assert "cluster" in choice.reason


def test_strips_that_fill_the_chip_are_not_shared() -> None:
    choice = choose(64, 8, 256)
    assert (choice.kernel, choice.split, choice.cluster) == ("rows", False, 1)


@pytest.mark.parametrize(("num_units", "most"), [(384, 4), (383, 2)])
def test_long_strips_are_cut_into_units(num_units: int, most: int) -> None:
    """An odd number of units says that strips are uneven."""
    for blocks, cluster in ((8 * most, 8), (8 * most + 1, 1)):
        choice = choose(8, blocks, 256, num_units)
        assert (choice.cluster, choice.split) == (cluster, cluster == 1)


def test_chips_before_hopper_have_no_clusters() -> None:
    choice = choose(8, 8, 256, hopper=False)
    assert (choice.cluster, choice.split) == (1, True)
