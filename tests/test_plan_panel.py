"""When the planner takes panels of W ahead of a dense product, and how large they are. No GPU is needed."""

from __future__ import annotations

import pytest

_plan = pytest.importorskip("torch_csb._plan", reason="the planner module is not built")

SMS = 132
MIB = 2**20
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
SHAPES = [(4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192), (8192, 28672), (4097, 5001)]


def spmm(dtype: str, features: int, depth: int, n: int, density: float = 0.5, block_size: int = 64, fits: bool = True):
    offer = _plan.PanelOffer(fits, features, depth, int(density * features * depth))
    return _plan.choose_cuda_spmm(dtype, block_size, -(-features // block_size), 384, n, SMS, offer)


def sddmm(dtype: str, m: int, k: int, n: int, density: float = 0.5, block_size: int = 64, fits: bool = True):
    offer = _plan.PanelOffer(fits, m, k, int(density * m * k))
    return _plan.choose_cuda_sddmm(dtype, block_size, 384, n, SMS, offer)


@pytest.mark.parametrize("n", [256, 1024, 4096, 100_000])
@pytest.mark.parametrize("dtype", ITEM)
@pytest.mark.parametrize(("features", "depth"), SHAPES)
@pytest.mark.parametrize("choose", [spmm, sddmm])
def test_a_panel_is_never_all_of_w_nor_more_than_32_mib(choose, features: int, depth: int, dtype: str, n: int) -> None:
    choice = choose(dtype, features, depth, n)
    assert choice.kernel == "panel"
    assert "panel" in choice.reason and choice.split in (False, 1)
    assert 0 < choice.tile_n < features and choice.tile_n % 256 == 0
    assert choice.tile_n * -(-depth // 8) * 8 * ITEM[dtype] <= 32 * MIB


def test_panels_fill_the_waves_of_the_chip() -> None:
    """4096 columns are 16 tiles of 256: 2048 features fill 1.94 waves of 132 tiles, 1792 only 1.70."""
    assert spmm("bfloat16", 4096, 4096, 4096).tile_n == 2048
    assert spmm("bfloat16", 8192, 8192, 4096).tile_n == 2048
    assert spmm("bfloat16", 11008, 4096, 4096).tile_n == 4096


def test_fewer_panels_where_none_fills_a_wave() -> None:
    assert spmm("bfloat16", 4096, 4096, 256).tile_n == 2048


def test_what_panels_are_not_for() -> None:
    assert spmm("bfloat16", 4096, 4096, 255).kernel == "wide"
    assert spmm("bfloat16", 4096, 4096, 4096, fits=False).kernel == "wide"
    assert spmm("float64", 4096, 4096, 4096).kernel == "gather"
    assert spmm("float32", 4096, 4096, 4096, block_size=8).kernel == "gather"
    assert spmm("float32", 4096, 4096, 4096, density=0.2).kernel == "rows"
    assert spmm("float32", 4096, 4096, 4096, density=0.05, block_size=128).kernel == "gather"
    assert sddmm("bfloat16", 4096, 4096, 255).kernel == "tile"
    assert sddmm("float64", 4096, 4096, 4096).kernel == "gather"
    assert sddmm("float32", 4096, 4096, 4096, fits=False).kernel == "region"
    assert sddmm("float32", 4096, 4096, 4096, density=0.15).kernel == "region"
    # One panel would be all of W, and one of 256 features more than 32 MiB.
    assert spmm("float32", 256, 65536, 4096).kernel == "rows"
    assert spmm("float32", 4096, 65536, 4096).kernel == "rows"
    # Small products are over before the panels are launched.
    assert spmm("bfloat16", 1024, 1024, 1024).kernel == "wide"


def test_nothing_is_offered_by_default() -> None:
    assert _plan.choose_cuda_spmm("bfloat16", 64, 64, 384, 4096, SMS).kernel == "wide"
    assert _plan.choose_cuda_spmm("bfloat16", 64, 64, 384, 4096, SMS, hopper=False).kernel == "tile"
    assert _plan.choose_cuda_sddmm("bfloat16", 64, 384, 4096, SMS).kernel == "tile"
