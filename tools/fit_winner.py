"""Fits the rules of torch_csb/_winner.py to the rows of benchmarks/results and prints how often they are right.

    PYTHONPATH=. .venv/bin/python tools/fit_winner.py

A row counts where CSB and dense differ by more than 5 %. "held out" is of layers of the Deep Learning Matrix
Collection, or of shapes, that the rule was not fitted to. Needs scikit-learn.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch_csb._winner import RULE_16_BIT, RULE_FLOAT32, RULE_FLOAT32_DW, Rule, dense_wins

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
GPU, CPU = "nvidia-h200", "intel-r-xeon-r-processor-2-threads-avx512"
OPERATORS = {"F": "spmm", "T": "spmm_t", "dW": "sddmm"}
GRID = ("decode", "train", "fp32", "sddmm")
FOLDS = 3

Row = dict[str, str]


@dataclass(frozen=True)
class Asked:
    """A rule, and of which products it is asked."""

    rule: Rule
    item_bytes: int
    directions: tuple[str, ...]


RULES = {
    "RULE_16_BIT": Asked(RULE_16_BIT, 2, ("F", "T")),
    "RULE_FLOAT32": Asked(RULE_FLOAT32, 4, ("F", "T")),
    "RULE_FLOAT32_DW": Asked(RULE_FLOAT32_DW, 4, ("dW",)),
}


def rows(*names: str, device: str = GPU) -> list[Row]:
    """Rows of CSB that differ from dense by more than 5 %, of the last commit that measured so many columns at such a
    sparsity: older ones are of older kernels."""
    found = []
    for name in names:
        with open(RESULTS / device / f"{name}.csv", newline="") as file:
            mine = [row for row in csv.DictReader(file) if row["impl"] == "csb" and row["ratio_to_dense"]]
        last = {group(row): row["commit"] for row in sorted(mine, key=lambda row: row["date"])}
        found += [row for row in mine if row["commit"] == last[group(row)]]
    return [row for row in found if abs(math.log(csb_ratio(row))) > math.log(1.05)]


def group(row: Row) -> tuple[str, ...]:
    return row["dtype"], row["n"], row["direction"], row["sparsity"]


def csb_ratio(row: Row) -> float:
    """Times as fast as dense."""
    return float(row["ratio_to_dense"])


def sizes(row: Row) -> tuple[int, int, int, float]:
    """Output features, input features, columns, sparsity."""
    m, k = int(row["m"]), int(row["k"])
    features, depth = (k, m) if row["direction"] == "T" else (m, k)
    return features, depth, int(row["n"]), float(row["sparsity"])


def item_bytes(row: Row) -> int:
    return {"float64": 8, "float32": 4}.get(row["dtype"], 2)


def right(row: Row) -> bool:
    cuda = row["device"].startswith("NVIDIA")
    said = dense_wins(OPERATORS[row["direction"]], cuda, item_bytes(row), *sizes(row))
    return said == (csb_ratio(row) < 1)


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


def folds(many: list[Row], key: Callable[[Row], str]) -> Iterator[tuple[list[Row], list[Row]]]:
    order = {name: i for i, name in enumerate(sorted({key(row) for row in many}))}
    numbers = [order[key(row)] % FOLDS for row in many]
    for fold in range(FOLDS):
        kept = [row for row, number in zip(many, numbers, strict=True) if number != fold]
        held = [row for row, number in zip(many, numbers, strict=True) if number == fold]
        yield kept, held


def fit(rule: Rule, given: list[Row]) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    terms = [rule.terms(*sizes(row)) for row in given]
    return LogisticRegression(max_iter=10_000).fit(terms, [csb_ratio(row) > 1 for row in given])


def rows_of(name: str, *files: str) -> list[Row]:
    """Rows of the products for which the rule of this name is asked."""
    asked = RULES[name]
    products = [row for row in rows(*files) if row["direction"] in asked.directions]
    products = [row for row in products if item_bytes(row) == asked.item_bytes]
    return [row for row in products if asked.rule.least <= int(row["n"]) <= asked.rule.most]


def held_out(rule: Rule, always: list[Row], many: list[Row], key: Callable[[Row], str]) -> list[bool]:
    """For each of ``many`` whether it is named right by a fit to ``always`` and to those of ``many`` of other keys."""
    found = []
    for kept, held in folds(many, key):
        said = fit(rule, always + kept).predict([rule.terms(*sizes(row)) for row in held])
        found += [bool(wins) == (csb_ratio(row) > 1) for wins, row in zip(said, held, strict=True)]
    return found


def layer(row: Row) -> str:
    return row["pattern"].rpartition("/")[2]


def shape(row: Row) -> str:
    return f"{row['m']}x{row['k']}"


def main() -> int:
    for name, asked in RULES.items():
        rule = asked.rule
        grid, collection = rows_of(name, *GRID), rows_of(name, "dlmc")
        fitted = fit(rule, grid + collection)
        print(f"{name}: constant {fitted.intercept_[0]:.2f}, weights", *(f"{w:.2f}" for w in fitted.coef_[0]))
        for what, found in (
            ("layers of the collection", held_out(rule, grid, collection, layer)),
            ("shapes of the grid", held_out(rule, collection, grid, shape)),
        ):
            print(f"  held out {what}: {share(found):.1%} of {len(found)} right")
    for name, many in (("grid", rows(*GRID)), ("collection", rows("dlmc")), ("CPU", rows("cpu", device=CPU))):
        for direction in OPERATORS:
            found = [right(row) for row in many if row["direction"] == direction]
            if found:
                print(f"as it stands, {name}, {direction}: {share(found):.1%} of {len(found)} right")
        print(f"as it stands, {name}: {share([right(row) for row in many]):.1%} of {len(many)} right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
