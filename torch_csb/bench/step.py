"""A whole fine-tuning step of an MLP: its time and its memory, dense, masked by torch.nn.utils.prune, and CSB.

A step is forward, mean squared error, backward, AdamW and zero_grad(set_to_none=True). ``dense`` trains every weight,
``masked`` and ``csb`` the same pruned ones. float32 runs without TF32, torch's default for products.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torch_csb._progress import progress
from torch_csb.bench import pictures
from torch_csb.bench.contest import check_error, error_floor
from torch_csb.bench.judge import WrongResult
from torch_csb.bench.model import rows_of
from torch_csb.bench.options import add_common
from torch_csb.bench.report import Provenance, append_csv, cell, csv_path, table
from torch_csb.bench.timing import time_cpu
from torch_csb.bench.trainee import PARTS, gradient_error, make_trainees, time_steps

WIDTH, DEPTH, SPARSITY = 4096, 4, 0.9
BATCH = {"cpu": 256, "cuda": 4096}
SECONDS = {"cpu": 12.0, "cuda": 2.0}  # of sampling: for all variants together, for each variant
# Gradients of dense layers must be a fair measure themselves.
TORCH_ERROR = 0.1


@dataclass
class StepRow:
    """One variant of a step. The field order is the CSV's; empty cells are None.

    weights: parameters and buffers (masks, indices, plan). gradients: of the parameters. optimizer: its state.
    activations: what the forward leaves behind, for ``masked`` the products orig * mask too, and on CUDA the squared
    differences, at whose head the loss stands. workspace: the peak minus
    all of these, so the five add up to it; negative where they are never all alive at once (gradients come while
    activations go). Inputs and targets, and cuBLAS's own scratch, are in none of them. A CPU has no allocator that
    counts: there activations are the tensors saved for the backward, and peak and workspace are empty.
    ``rel_err`` is the worst relative Frobenius error of the first step's gradients against float64.
    """

    date: str
    commit: str
    device: str
    torch: str
    dtype: str
    width: int
    depth: int
    batch: int
    sparsity: float
    variant: str
    us: float
    us_spread: float
    peak_bytes: int | None
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    workspace_bytes: int | None
    ratio_to_masked: float
    rel_err: float


def measure(
    device: str,
    dtype: str | torch.dtype,
    width: int = WIDTH,
    depth: int = DEPTH,
    batch: int | None = None,
    sparsity: float = SPARSITY,
    seed: int = 0,
    commit: str | None = None,
) -> list[StepRow]:
    """A row for each of dense, masked and csb.

    Raises:
        WrongResult: gradients of a first step are further from float64 than rounding explains.
        ValueError: a size below 1, or sparsify_ would not convert every layer at this size and sparsity.
    """
    for name, size in (("width", width), ("depth", depth), ("batch", batch or 1)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity: expected a number between 0 and 1, got {sparsity}")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    batch = batch or BATCH[device]
    trainees = make_trainees(device, dtype, width, depth, batch, sparsity, seed)
    errors: dict[str, float] = {}
    for name, trainee in trainees.items():
        errors[name] = gradient_error(trainee, trainees["dense" if name == "dense" else "masked"].model)
        limit = max(2 * errors["masked"], error_floor(dtype)) if name == "csb" else TORCH_ERROR
        check_error(errors[name], limit, f"gradients of a step, {dtype}, {name}")
    for trainee in trainees.values():
        trainee.step()
    held = {name: trainee.memory() for name, trainee in trainees.items()}
    if device == "cpu":
        timings = time_cpu({name: trainee.step for name, trainee in trainees.items()}, SECONDS["cpu"])
    else:
        timings = {name: time_steps(trainee, SECONDS["cuda"]) for name, trainee in trainees.items()}
    provenance = Provenance.of(device, commit)
    what = {"dtype": str(dtype).removeprefix("torch."), "width": width, "depth": depth, "batch": batch}
    return [
        StepRow(
            **provenance.stamp(),
            **what,
            sparsity=sparsity,
            variant=name,
            us=timing.us,
            us_spread=timing.us_spread,
            **held[name],
            ratio_to_masked=timings["masked"].us / timing.us,
            rel_err=errors[name],
        )
        for name, timing in timings.items()
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, action="append", help="default: float32, on CUDA both")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--batch", type=int, help=f"default: {BATCH['cuda']}, on a CPU {BATCH['cpu']}")
    parser.add_argument("--sparsity", type=float, default=SPARSITY)
    parser.add_argument("--resume", action="store_true", help="skip what the CSV already holds for this commit")


def run(options: argparse.Namespace) -> int:
    sizes = {name: getattr(options, name) for name in ("width", "depth", "sparsity")}
    return _run(options, options.dtype, **sizes, batch=options.batch or BATCH[options.device])


def run_for_regime(options: argparse.Namespace) -> int:
    """The step at its default sizes, for a command that has the common options and --resume."""
    return _run(options, None, width=WIDTH, depth=DEPTH, sparsity=SPARSITY, batch=BATCH[options.device])


def _run(options: argparse.Namespace, dtypes: Sequence[str] | None, **sizes: Any) -> int:
    provenance = Provenance.of(options.device, options.commit)
    path = csv_path(options.results, provenance.device, "train_step")
    dtypes = list(dict.fromkeys(dtypes or (["float32", "bfloat16"] if options.device == "cuda" else ["float32"])))
    if options.resume:
        same = [row for row in rows_of(path, provenance) if all(row[key] == cell(sizes[key]) for key in sizes)]
        dtypes = [dtype for dtype in dtypes if dtype not in {row["dtype"] for row in same}]
    rows: list[StepRow] = []
    try:
        for dtype in progress(dtypes, "step", "dtypes"):
            new = measure(options.device, dtype, **sizes, seed=options.seed, commit=options.commit)
            append(new, options.results)
            rows += new
    except (WrongResult, ValueError) as error:
        print(f"\n{error}\nNothing was written of that case.")
        return 1 if isinstance(error, WrongResult) else 2
    if not rows:
        print(f"step: skipped, {path} holds it")
        return 0
    print_table(rows)
    print(f"{len(rows)} rows appended to {path}")
    draw(rows, csv_path(options.plots, provenance.device, "train_step").with_suffix(".png"))
    return 0


def append(rows: Sequence[StepRow], results: Path) -> Path:
    """Adds the rows to ``results/<device>/train_step.csv`` and returns its path."""
    path = csv_path(results, rows[0].device, "train_step")
    append_csv(rows, path)
    return path


def _sizes(row: StepRow) -> str:
    return f"one step of {row.depth} layers {row.width} wide, batch {row.batch}, {100 * row.sparsity:g} % zeros"


def print_table(rows: Sequence[StepRow]) -> None:
    print(f"\n{_sizes(rows[0])}, MiB")
    lines = []
    for row in rows:
        line: dict[str, Any] = {"dtype": row.dtype, "variant": row.variant, "µs": row.us, "spread": row.us_spread}
        line |= {"masked/this": row.ratio_to_masked, "rel_err": row.rel_err}
        sizes = {part: getattr(row, f"{part}_bytes") for part in PARTS}
        line |= {part: None if size is None else f"{size / 2**20:,.1f}" for part, size in sizes.items()}
        # The sum is the peak where that was measured.
        lines.append(SimpleNamespace(**line, sum=f"{sum(size or 0 for size in sizes.values()) / 2**20:,.1f}"))
    print(table(lines, tuple(vars(lines[0]))))
    if rows[0].peak_bytes is not None:
        print("sum = peak; a negative workspace says that the parts were never all alive at once")


def draw(rows: Sequence[StepRow], target: Path) -> None:
    """A stacked bar for each dtype and variant, and a mark at the peak."""
    figure = pictures.new_figure(2 + 1.3 * len(rows), 5)
    if figure is None:
        return
    axis = figure.subplots()
    at, bottom = range(len(rows)), [0.0] * len(rows)
    for part in PARTS if rows[0].peak_bytes is not None else PARTS[:-1]:
        sizes = [max(0, getattr(row, f"{part}_bytes") or 0) / 2**20 for row in rows]
        axis.bar(at, sizes, 0.7, bottom, label=part)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    for i, row in enumerate(rows):
        if row.peak_bytes is not None:
            peak = row.peak_bytes / 2**20
            axis.hlines(peak, i - 0.4, i + 0.4, color="black", label="peak" if i == 0 else None)
    axis.set_xticks(at, [f"{row.variant}\n{row.dtype}\n{row.us / 1000:.3g} ms" for row in rows])
    axis.set_ylabel("MiB")
    axis.legend(frameon=False)
    axis.set_title(f"{_sizes(rows[0])}\n{rows[0].device}, commit {rows[0].commit}", fontsize=10)
    pictures.save(figure, target)
