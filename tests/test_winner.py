"""The rules that say whether dense would be faster, against the rows that the benchmarks left."""

from __future__ import annotations

from types import ModuleType

import pytest

from tools import tool
from torch_csb._winner import dense_wins


@pytest.fixture
def fit() -> ModuleType:
    found = tool("fit_winner")
    if not found.RESULTS.is_dir():
        pytest.skip("a source archive has no benchmark rows")
    return found


def test_the_measured_winner_of_the_grid_is_named(fit) -> None:
    rows = fit.rows(*fit.GRID)
    won = [fit.csb_ratio(row) > 1 for row in rows]
    assert len(rows) > 500 and 0.3 < fit.share(won) < 0.7
    assert fit.share([fit.right(row) for row in rows]) >= 0.95


def test_the_measured_winner_of_the_collection_is_named(fit) -> None:
    rows = fit.rows("dlmc")
    assert len(rows) > 800 and fit.share([fit.right(row) for row in rows]) >= 0.95
    # Where the layers are small dense nearly always wins: also count those where it didn't.
    won = [row for row in rows if fit.csb_ratio(row) > 1]
    assert len(won) > 50 and fit.share([fit.right(row) for row in won]) >= 0.9


def test_the_measured_winner_on_a_cpu_is_named(fit) -> None:
    rows = fit.rows("cpu", device=fit.CPU)
    won = [fit.csb_ratio(row) > 1 for row in rows]
    assert len(rows) > 100 and fit.share(won) < 0.9
    assert fit.share([fit.right(row) for row in rows]) >= 0.9


def test_what_the_rules_were_not_fitted_to(fit) -> None:
    pytest.importorskip("sklearn")
    for name, asked in fit.RULES.items():
        rule, grid, collection = asked.rule, fit.rows_of(name, *fit.GRID), fit.rows_of(name, "dlmc")
        for found in (fit.held_out(rule, grid, collection, fit.layer), fit.held_out(rule, collection, grid, fit.shape)):
            assert len(found) > 50 and fit.share(found) >= 0.9


def test_rules_are_those_that_the_rows_give(fit) -> None:
    pytest.importorskip("sklearn")
    for name, asked in fit.RULES.items():
        rule = asked.rule
        fitted = fit.fit(rule, fit.rows_of(name, *fit.GRID, "dlmc"))
        assert rule.constant == pytest.approx(fitted.intercept_[0], abs=0.5)
        assert rule.weights == pytest.approx(fitted.coef_[0].tolist(), abs=0.05)


@pytest.mark.parametrize("operator", ["spmm", "spmm_t"])
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("item_bytes", [2, 4, 8])
@pytest.mark.parametrize("n", [1, 8, 17, 64, 256, 4096])
def test_more_zeros_never_speak_for_dense(operator: str, cuda: bool, item_bytes: int, n: int) -> None:
    for features, depth in ((4096, 4096), (64, 256), (28672, 8192)):
        said = [dense_wins(operator, cuda, item_bytes, features, depth, n, s / 100) for s in range(101)]
        assert said == sorted(said, reverse=True)


def test_small_weights_lose_earlier() -> None:
    assert not dense_wins("spmm", True, 4, 4096, 4096, 256, 0.95)
    assert dense_wins("spmm", True, 4, 256, 64, 256, 0.95)
    assert dense_wins("spmm", True, 2, 512, 512, 64, 0.98)


@pytest.mark.parametrize("shape", [(0, 64, 1), (64, 0, 64), (1, 1, 4096), (2**31, 2**31, 2**31)], ids=str)
@pytest.mark.parametrize("operator", ["spmm", "spmm_t", "sddmm"])
@pytest.mark.parametrize("cuda", [False, True])
def test_without_zeros_dense_wins_at_any_size(shape: tuple[int, int, int], operator: str, cuda: bool) -> None:
    for item_bytes in (2, 4, 8):
        assert dense_wins(operator, cuda, item_bytes, *shape, 0.0)
