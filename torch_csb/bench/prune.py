"""Accuracy of each pruning method on scikit-learn's digits, at several sparsities and seeds, with its controls.

A dense net is trained for each seed. Each method prunes a copy of it while that trains on; then sparsify_ converts it,
and it is fine-tuned as CSB. Controls: ``random`` prunes without looking, ``scratch`` trains the masks of ``magnitude``
from fresh weights for as long as the dense net and the pruning together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_csb._progress import progress
from torch_csb.bench import digits, prune_summary, pruning
from torch_csb.bench.model import rows_of
from torch_csb.bench.options import add_common, fraction, positive
from torch_csb.bench.pruning import Runs
from torch_csb.bench.report import Provenance, append_csv, cell

EPOCHS, SEEDS = 30, 5
SPARSITIES = (0.8, 0.9, 0.95, 0.98)

Case = tuple[int, float, str]  # seed, sparsity, method


@dataclass
class PruneRow:
    """One method at one sparsity from one seed. The field order is the CSV's; empty cells are None.

    ``sparsity`` is asked for, of the pruned layers; ``achieved_sparsity`` is that of the masks. Accuracies are percent
    of the held-out quarter classified right: of the dense net that pruning starts from, after pruning, and after
    fine-tuning as CSB. ``magnitude-4-bit`` goes on from the fine-tuned CSB net of ``magnitude``: that one's accuracy is
    its ``accuracy_pruned``, and ``accuracy_csb`` is that with 16 shared values a layer. ``epochs``: of dense training
    and of pruning, each. ``seconds``: of pruning and fine-tuning, without what other rows share. ``bytes_*``: what
    ``torch_csb.prune.CompressedSizes`` counts.
    """

    date: str
    commit: str
    device: str
    torch: str
    method: str
    sparsity: float
    seed: int
    epochs: int
    accuracy_dense: float
    accuracy_pruned: float
    accuracy_csb: float
    achieved_sparsity: float
    seconds: float
    bytes_dense: int | None
    bytes_csb: int | None
    bytes_codes: int | None
    bytes_file: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--method", choices=pruning.NAMES, action="append", help="default: each")
    default = ", ".join(map(str, SPARSITIES))
    parser.add_argument("--sparsity", type=fraction, action="append", help=f"default: {default}")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help=f"how many, from --seed on (default: {SEEDS})")
    parser.add_argument(
        "--epochs", type=positive, default=EPOCHS, help=f"of dense training and of pruning, each (default: {EPOCHS})"
    )
    parser.add_argument("--resume", action="store_true", help="skip what the CSV already holds for this commit")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")


def run(options: argparse.Namespace) -> int:
    provenance = Provenance.of(options.device, options.commit)
    # Accuracies belong to no processor, so unlike those of timings the folder names the kind of device only.
    path = options.results / options.device / "prune.csv"
    methods = [name for name in pruning.NAMES if name in (options.method or pruning.NAMES)]
    sparsities = sorted(set(options.sparsity or SPARSITIES))
    seeds = range(options.seed, options.seed + options.seeds)
    cases = [(seed, sparsity, method) for seed in seeds for sparsity in sparsities for method in methods]
    held = _held(path, provenance, options.epochs) if options.resume else {}
    todo = [case for case in cases if case not in held]
    if options.resume or options.dry_run:
        print(f"prune: {len(todo)} of {len(cases)} runs to do, {options.epochs} epochs; rows go to {path}")
    if options.dry_run:
        for seed, sparsity, method in todo:
            print(f"seed {seed}, {100 * sparsity:g} % zeros, {method}")
        return 0
    try:
        _run_all(todo, options, provenance, path)
    except ValueError as error:
        print(f"\n{error}")
        return 2
    print(f"{len(todo)} rows appended to {path}")
    held = _held(path, provenance, options.epochs)
    rows = [held[case] for case in cases]
    prune_summary.print_tables(rows)
    prune_summary.draw(rows, options.plots / options.device / "prune.png")
    return 0


def _run_all(todo: Sequence[Case], options: argparse.Namespace, provenance: Provenance, path: Path) -> None:
    if not todo:
        return
    data, runs = digits.load(options.device), None
    for seed, sparsity, method in progress(todo, "prune", "runs"):
        if runs is None or runs.seed != seed:
            runs = Runs(data, options.epochs, seed)
        what = {"method": method, "sparsity": sparsity, "seed": seed, "epochs": options.epochs}
        numbers = runs.run(method, sparsity)
        # One by one: what is interrupted loses one run.
        append_csv([PruneRow(**provenance.stamp(), **what, **numbers)], path)


def _held(path: Path, provenance: Provenance, epochs: int) -> dict[Case, dict[str, str]]:
    """The rows of this commit, torch and number of epochs, of a case the last."""
    rows = [row for row in rows_of(path, provenance) if row["epochs"] == cell(epochs)]
    return {(int(row["seed"]), float(row["sparsity"]), row["method"]): row for row in rows}
