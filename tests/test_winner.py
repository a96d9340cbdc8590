"""The rules that say whether dense would be faster, against the rows that the benchmarks left."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from torch_csb._winner import RULE_16_BIT, RULE_FLOAT32, dense_wins

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def fit():
    path = ROOT / "tools" / "fit_winner.py"
    if not path.is_file():
        pytest.skip("a source checkout is needed")
    specification = importlib.util.spec_from_file_location("fit_winner", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_measured_winner_of_the_grid_is_named(fit) -> None:
    rows = fit.rows("decode", "train", "fp32")
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


@pytest.mark.parametrize("fold", range(3))
def test_layers_that_the_rule_was_not_fitted_to(fit, fold: int) -> None:
    pytest.importorskip("sklearn")
    rows = [row for row in fit.rows("fp32", "dlmc") if row["direction"] != "dW"]
    rows = [row for row in rows if fit.item_bytes(row) == 4 and int(row["n"]) >= RULE_FLOAT32.least]
    kept, held = list(fit.folds(rows, lambda row: row["pattern"] + row["m"]))[fold]
    fitted = fit.fit(RULE_FLOAT32, kept)
    said = fitted.predict([RULE_FLOAT32.terms(*fit.sizes(row)) for row in held])
    found = [bool(wins) == (fit.csb_ratio(row) > 1) for wins, row in zip(said, held, strict=True)]
    assert len(found) > 50 and fit.share(found) >= 0.9


def test_rules_are_those_that_the_rows_give(fit) -> None:
    pytest.importorskip("sklearn")
    rows = [row for row in fit.rows("decode", "train", "fp32", "dlmc") if row["direction"] != "dW"]
    for rule, item in ((RULE_16_BIT, 2), (RULE_FLOAT32, 4)):
        mine = [row for row in rows if fit.item_bytes(row) == item and rule.least <= int(row["n"]) <= rule.most]
        fitted = fit.fit(rule, mine)
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
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_any_size_has_an_answer(shape: tuple[int, int, int], sparsity: float) -> None:
    for operator in ("spmm", "spmm_t", "sddmm"):
        for cuda in (False, True):
            assert dense_wins(operator, cuda, 4, *shape, sparsity) in (True, False)
