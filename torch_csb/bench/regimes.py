"""The regimes of products: decode, train, fp32, sddmm, dlmc, cpu."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torch_csb._progress import progress
from torch_csb.bench import plot, report, step
from torch_csb.bench.cases import DIRECTIONS, DTYPES, LAYOUTS, REGIMES, Case, Grid, cases_of, key_of, weights_of
from torch_csb.bench.implementations import IMPLEMENTATIONS, layouts_offered
from torch_csb.bench.judge import WrongResult
from torch_csb.bench.limits import measure_limits
from torch_csb.bench.options import add_common, fraction, positive, shape
from torch_csb.bench.patterns import PATTERNS, Collection
from torch_csb.bench.report import Provenance, Row
from torch_csb.bench.summary import print_summary
from torch_csb.bench.sweep import Bench

HELP = {
    "decode": "few columns in 16 bit: Y = W.X and X = W^T.Y at n = 1 … 64",
    "train": "n = 1024 and 4096 in 16 bit: both products, the gradient, and a whole fine-tuning step",
    "fp32": "float32 from n = 1 to 4096; dense without and with TF32",
    "sddmm": "the gradient of the weight",
    "dlmc": "real patterns: the Deep Learning Matrix Collection",
    "cpu": "float32 on the CPU",
}


def add_arguments(regime: str, parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.set_defaults(device=REGIMES[regime].device)
    parser.add_argument(
        "--grid",
        choices=["quick", "full"],
        default="quick",
        help="quick: four shapes, 50 to 98 %% zeros, uniform, csb and dense; full: all patterns, layouts and peers",
    )
    axis = partial(parser.add_argument, action="append", help="instead of the grid's; may be repeated")
    axis("--shape", type=shape, metavar="MxK")
    axis("--sparsity", type=fraction, metavar="FRACTION")
    axis("--n", type=positive, metavar="COLUMNS")
    axis("--dtype", choices=DTYPES)
    axis("--direction", choices=DIRECTIONS)
    axis("--pattern", metavar="NAME" if regime == "dlmc" else "{" + ",".join(PATTERNS) + "}")
    axis("--layout", choices=LAYOUTS)
    axis("--impl", choices=list(IMPLEMENTATIONS))
    parser.add_argument("--resume", action="store_true", help="skip the cases that the CSV has of the same commit")
    parser.add_argument("--minutes", type=float, help="begin no further weight after this time; go on with --resume")
    parser.add_argument("--seconds", type=float, help="of sampling for a case (CPU) or each of its rows (CUDA)")
    parser.add_argument("--dry-run", action="store_true", help="count the cases and measure nothing")
    if regime == "dlmc":
        parser.add_argument("--dlmc", type=Path, required=True, help="folder of the collection (see the README)")
    if regime == "train":
        action = argparse.BooleanOptionalAction
        parser.add_argument("--step", action=action, default=True, help="a whole fine-tuning step too")


def run(regime: str, options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{regime} measures a CUDA device and torch sees none: use the command cpu, or --device cpu")
        return 2
    try:
        grid = choose_grid(regime, options)
        collection = Collection(options.dlmc) if regime == "dlmc" else None
        plan = [(w, cases_of(grid, w, collection)) for w in weights_of(grid, collection)]
    except ValueError as error:
        print(error)
        return 2
    provenance = Provenance.of(options.device, options.commit)
    path = report.csv_path(options.results, provenance.device, regime)
    if options.resume:
        done = _rows_of_commit(path, provenance)
        plan = [(w, [case for case in cases if not _is_done(case, done, options.device)]) for w, cases in plan]
    plan = [(w, cases) for w, cases in plan if cases]
    total = sum(len(cases) for _, cases in plan)
    print(f"{regime}: {total} cases on {len(plan)} weights, {provenance.device}, torch {provenance.torch}")
    if options.dry_run:
        for _, cases in plan:
            print(f"  {cases[0]}" + (f" and {len(cases) - 1} more" if len(cases) > 1 else ""))
        return 0
    if total:
        try:
            rows = measure(plan, options, provenance, path, collection)
        except (WrongResult, ValueError) as error:
            print(f"\n{error}\nNothing was written of that case.")
            return 1
        print_summary(rows)
        plot.draw_regime(path, options.plots / path.parent.name / f"{regime}.png")
    return step.run_for_regime(options) if regime == "train" and options.step else 0


def measure(
    plan: list[tuple[Any, list[Case]]],
    options: argparse.Namespace,
    provenance: Provenance,
    path: Path,
    collection: Collection | None,
) -> list[Row]:
    """Measures and appends case by case, so that an interruption loses one case at most."""
    torch.manual_seed(options.seed)
    limits = measure_limits(options.device, tuple(dict.fromkeys(w.dtype for w, _ in plan)))
    print(limits, flush=True)
    limits.append(provenance, options.results)
    started, rows, current = time.monotonic(), [], None
    todo = [(w, case) for w, cases in plan for case in cases]
    for weights, case in progress(todo, path.stem, "cases"):
        if current != weights:
            if options.minutes and time.monotonic() - started > 60 * options.minutes:
                print(f"{len(rows)} rows in {options.minutes:g} minutes; --resume goes on with the rest")
                break
            bench = Bench(weights, options.device, options.seed, collection)
            current = weights
        with torch.no_grad():
            new = bench.measure(case, limits, provenance, options.seconds, print)
        report.append_csv(new, path)
        rows += new
    print(f"{len(rows)} rows appended to {path} in {time.monotonic() - started:.0f} s")
    return rows


def choose_grid(regime: str, options: argparse.Namespace) -> Grid:
    """The regime's grid with the axes that the command line gives."""
    grid = REGIMES[regime] if options.grid == "quick" else REGIMES[regime].full()
    given = {
        "shapes": options.shape,
        "sparsities": options.sparsity,
        "columns": options.n,
        "dtypes": options.dtype,
        "directions": options.direction,
        "patterns": options.pattern,
        "layouts": options.layout,
        "implementations": options.impl,
    }
    grid = replace(grid, **{axis: tuple(dict.fromkeys(values)) for axis, values in given.items() if values})
    unknown = [pattern for pattern in grid.patterns if regime != "dlmc" and pattern not in PATTERNS]
    if unknown:
        raise ValueError(f"--pattern: expected one of {', '.join(PATTERNS)}, got {', '.join(unknown)}")
    if "dense" not in grid.implementations:
        grid = replace(grid, implementations=("dense", *grid.implementations))  # no ratio without its dense row
    return grid


def _rows_of_commit(path: Path, provenance: Provenance) -> dict[tuple[str, ...], set[str]]:
    """The implementations that the CSV has of each case, measured at this commit with this torch."""
    done: dict[tuple[str, ...], set[str]] = {}
    for row in report.read_csv(path):
        if (row["commit"], row["torch"]) == (provenance.commit, provenance.torch):
            done.setdefault(key_of(row), set()).add(row["impl"])
    return done


def _is_done(case: Case, done: dict[tuple[str, ...], set[str]], device: str) -> bool:
    dtype = getattr(torch, case.weights.dtype)
    wanted = {name for name in case.implementations if layouts_offered(name, case.direction, dtype, device, case.n)}
    return wanted <= done.get(case.key(), set())


def commands() -> Iterable[tuple[str, str, Callable[..., None], Callable[..., int]]]:
    """(name, help, add_arguments, run) of each regime."""
    for regime, text in HELP.items():
        yield regime, text, partial(add_arguments, regime), partial(run, regime)
