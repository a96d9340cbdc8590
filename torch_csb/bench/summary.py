"""The ratios to dense of CSVs at one glance: geometric means over the shapes, and the cases that dense wins."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence

from torch_csb.bench.options import add_common, existing_file
from torch_csb.bench.report import Row, from_cells, is_regime, newest, read_csv, table

COLUMNS = (
    "m",
    "k",
    "n",
    "dtype",
    "pattern",
    "layout",
    "sparsity",
    "direction",
    "impl",
    "us",
    "us_spread",
    "gbps",
    "tflops",
    "limit_share",
    "ratio_to_dense",
    "rel_err",
)
MOST_ROWS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("csv", nargs="+", type=existing_file, help="of the timing regimes")


def run(options: argparse.Namespace) -> int:
    """The newest row of each case counts."""
    for path in options.csv:
        if not is_regime(path):
            print(f"{path}: not a timing regime's columns, so there is nothing to sum up\n")
            continue
        rows = [from_cells(row) for row in newest(read_csv(path))]
        print(f"{path}\n{_means(rows)}\n{_losing(rows)}\n")
    return 0


def print_summary(rows: Sequence[Row]) -> None:
    if not rows:
        return
    print("\n" + table(rows[:MOST_ROWS], COLUMNS))
    if len(rows) > MOST_ROWS:
        print(f"… and {len(rows) - MOST_ROWS} more rows in the CSV")
    print("\ntimes faster than dense (geometric mean over shapes, or over the collection's layers):")
    print(_means(rows))
    print(_losing(rows))


def _losing(rows: Sequence[Row]) -> str:
    csb = [row for row in rows if row.impl == "csb" and row.ratio_to_dense is not None]
    losing = sum(row.ratio_to_dense < 1 for row in csb)
    return f"dense is faster than csb in {losing} of {len(csb)} rows"


def _means(rows: Sequence[Row]) -> str:
    """A line for each (dtype, direction, n, pattern, layout, impl), a column for each sparsity."""
    cells: dict[tuple[str, ...], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.ratio_to_dense is not None and row.impl != "dense":
            real = row.pattern.startswith("dlmc:")
            pattern = "/".join(row.pattern.split("/")[:1]) if real else row.pattern
            n = "own" if real else str(row.n)
            layout = row.layout if row.impl == "csb" else "fastest"
            cells[row.dtype, row.direction, n, pattern, layout, row.impl][row.sparsity].append(row.ratio_to_dense)
    sparsities = sorted({sparsity for line in cells.values() for sparsity in line})
    lines = [["dtype", "dir", "n", "pattern", "layout", "impl", *(f"{100 * s:g} %" for s in sparsities)]]
    # n by its size: "own" last
    for key, line in sorted(cells.items(), key=lambda item: (*item[0][:2], item[0][2].zfill(9), *item[0][3:])):
        lines.append([*key, *(f"{statistics.geometric_mean(line[s]):.2f}" if s in line else "–" for s in sparsities)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
