"""Measures rows of a CSV again and prints how far the two runs lie apart."""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import torch

from torch_csb._progress import progress
from torch_csb.bench import report
from torch_csb.bench.cases import Case, Weights
from torch_csb.bench.implementations import IMPLEMENTATIONS
from torch_csb.bench.judge import WrongResult
from torch_csb.bench.limits import measure_limits
from torch_csb.bench.options import add_common
from torch_csb.bench.patterns import Collection
from torch_csb.bench.report import Provenance
from torch_csb.bench.sweep import Bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("csv", type=Path, nargs="+", help="of the timing regimes, taken on this device")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--limit", type=float, default=0.03, help="largest median difference, as a fraction")
    parser.add_argument("--seconds", type=float, help="of sampling for a case (CPU) or each of its rows (CUDA)")
    parser.add_argument("--dlmc", type=Path, help="folder of the collection, for its rows")


def run(options: argparse.Namespace) -> int:
    provenance = Provenance.of(options.device, options.commit)
    rows = [row for path in options.csv for row in report.read_csv(path)]
    rows = [row for row in rows if row["device"] == provenance.device and row["impl"] in IMPLEMENTATIONS]
    if not rows:
        print(f"no row of {provenance.device} in {', '.join(map(str, options.csv))}")
        return 2
    chosen = random.Random(options.seed).sample(rows, min(options.rows, len(rows)))
    collection = Collection(options.dlmc) if options.dlmc else None
    limits = measure_limits(options.device, tuple(sorted({row["dtype"] for row in rows})))
    torch.manual_seed(options.seed)
    differences = []
    for row in progress(chosen, "repeat", "rows"):
        case = _case(row)
        bench = Bench(case.weights, options.device, options.seed, collection)
        try:
            with torch.no_grad():
                again = bench.measure(case, limits, provenance, options.seconds, print)
        except WrongResult as error:
            print(error)
            return 1
        before = float(row["us"])
        after = min(new.us for new in again if new.impl == row["impl"])
        differences.append(abs(after - before) / before)
        print(f"{row['impl']:16}{case}: {before:,.4g} µs, again {after:,.4g} µs, {after / before - 1:+.1%}")
    median = statistics.median(differences)
    worst = max(differences)
    print(f"{len(differences)} rows again: median difference {median:.2%}, largest {worst:.1%}")
    if median > options.limit:
        print(f"the median is above {options.limit:.0%}: something else ran on the device, or its clocks changed")
        return 1
    return 0


def _case(row: dict[str, str]) -> Case:
    weights = Weights(int(row["m"]), int(row["k"]), row["dtype"], row["pattern"], float(row["sparsity"]))
    return Case(row["regime"], weights, int(row["n"]), row["direction"], (row["layout"],), (row["impl"],))
