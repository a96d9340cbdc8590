"""Which kernel reads a bitmap, and what the others are not given with one."""

from __future__ import annotations

import pytest

from torch_csb import _plan

SMS = 132


def choose(dtype: str, n: int, num_units: int = 528, **given) -> _plan.Choice:
    given = {"blocks_per_strip": 64, "bitmap": True, **given}
    return _plan.choose_cuda_spmm(dtype, 64, 64, num_units, n, SMS, **given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("n", "tile_n"), [(1, 8), (8, 8), (9, 16), (16, 16)])
@pytest.mark.parametrize("hopper", [False, True])
def test_few_columns_read_the_bitmap(dtype: str, n: int, tile_n: int, hopper: bool) -> None:
    choice = choose(dtype, n, hopper=hopper)
    assert (choice.kernel, choice.tile_n, choice.split, choice.cluster) == ("bitmap", tile_n, True, 1)
    assert "bitmap" in choice.reason
    assert not choose(dtype, n, num_units=1, hopper=hopper).split


def test_more_columns_are_given_codes() -> None:
    assert choose("bfloat16", 17).kernel == "wide"
    assert choose("bfloat16", 17, hopper=False).kernel == "tile"


@pytest.mark.parametrize("n", [1, 9])
def test_x_that_no_piece_can_be_read_of_goes_to_the_tile_kernel(n: int) -> None:
    assert choose("bfloat16", n, pieces=False).kernel == "tile"


@pytest.mark.parametrize("n", [17, 300, 4096])
def test_float32_keeps_off_the_kernel_that_wants_rows_in_order(n: int) -> None:
    assert choose("float32", n).kernel == "gather"
    assert choose("float32", n, bitmap=False).kernel == "rows"


@pytest.mark.parametrize(("dtype", "n"), [("bfloat16", 4096), ("float32", 4096)])
def test_panels_come_first(dtype: str, n: int) -> None:
    assert choose(dtype, n, offer=_plan.PanelOffer(True, 4096, 4096, 2**23)).kernel == "panel"
