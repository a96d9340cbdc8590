"""A whole fine-tuning step of an MLP: its time and its memory, dense, masked by torch.nn.utils.prune, and CSB.

A step is forward, mean squared error, backward, AdamW and zero_grad(set_to_none=True). ``dense`` trains every weight,
``masked`` and ``csb`` the same pruned ones. float32 runs without TF32, torch's default for products.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_csb._progress import progress
from torch_csb.bench import nets
from torch_csb.bench.judge import WrongResult
from torch_csb.bench.model import check_error, error_floor, pyplot, rows_of, save
from torch_csb.bench.options import add_common
from torch_csb.bench.report import Provenance, append_csv, cell, csv_path, table
from torch_csb.bench.timing import Timing, time_cpu
from torch_csb.nn import CSBLinear, sparsify_

WIDTH, DEPTH, SPARSITY = 4096, 4, 0.9
BATCH = {"cpu": 256, "cuda": 4096}
WARM_UP, FEWEST_STEPS, MOST_STEPS = 3, 5, 30
SECONDS = {"cpu": 12.0, "cuda": 2.0}  # of sampling: for all variants together, for each variant
# Gradients of dense layers must be a fair measure themselves.
TORCH_ERROR = 0.1
PARTS = ("weights", "gradients", "optimizer", "activations", "workspace")


@dataclass
class StepRow:
    """One variant of a step. The field order is the CSV's; empty cells are None.

    weights: parameters and buffers (masks, indices, plan). gradients: of the parameters. optimizer: its state.
    activations: what the forward leaves behind, for ``masked`` the products orig * mask too. workspace: the peak minus
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


class Trainee:
    """A model with its optimizer and one batch."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor) -> None:
        self.model, self.x, self.target = model.train(), x, target
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def forward(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.target)

    def step(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, int | None]:
        """Bytes of one more step, after the first has made the optimizer's state."""
        on_gpu = self.x.is_cuda
        nets.forget_masked_weights(self.model)
        gc.collect()
        weights = nets.weight_bytes(self.model)
        # AdamW counts its steps in one element on the host.
        slots = [t for slots in self.optimizer.state.values() for t in slots.values() if isinstance(t, Tensor)]
        state = nets.bytes_held(*(t for t in slots if t.device == self.x.device))
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = self.forward()
            activations = torch.cuda.memory_allocated() - before
        else:
            loss, activations = self._saved_for_backward()
        loss.backward()
        del loss
        gradients = nets.bytes_held(*(p.grad for p in self.model.parameters() if p.grad is not None))
        self.optimizer.step()
        peak = workspace = None
        if on_gpu:
            torch.cuda.synchronize()
            # Before the step this trainee held its weights and its optimizer's state.
            peak = torch.cuda.max_memory_allocated() - before + weights + state
            workspace = peak - weights - gradients - state - activations
        self.optimizer.zero_grad(set_to_none=True)
        held = (weights, gradients, state, activations, workspace)
        return {"peak_bytes": peak} | {f"{part}_bytes": size for part, size in zip(PARTS, held, strict=True)}

    def _saved_for_backward(self) -> tuple[Tensor, int]:
        known = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        known |= {self.x.untyped_storage().data_ptr(), self.target.untyped_storage().data_ptr()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        return loss, sum(saved.values())


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
    trainees = _trainees(device, dtype, width, depth, batch, sparsity, seed)
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
        timings = {name: time_steps(trainee) for name, trainee in trainees.items()}
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


def _trainees(
    device: str, dtype: torch.dtype, width: int, depth: int, batch: int, sparsity: float, seed: int
) -> dict[str, Trainee]:
    torch.manual_seed(seed)
    dense = nets.mlp(width, depth).to(device)
    masked = copy.deepcopy(dense)
    nets.prune_by_magnitude(masked, sparsity)
    nets.forget_masked_weights(masked)
    dense, masked = dense.to(dtype), masked.to(dtype)
    csb = copy.deepcopy(masked)
    report = sparsify_(csb, target=device, progress=False)
    if len(report.converted) < depth:
        raise ValueError(f"step: expected all {depth} layers to be converted\n{report}")
    x, target = (torch.randn(batch, width).to(device=device, dtype=dtype) for _ in range(2))
    return {name: Trainee(model, x, target) for name, model in (("dense", dense), ("masked", masked), ("csb", csb))}


def gradient_error(trainee: Trainee, model: nn.Module) -> float:
    """The worst relative Frobenius error of the weights' gradients against those of ``model`` in float64, at the
    entries that survived.

    Which units ReLU lets through is taken from the run under test: where its input is zero but for rounding, either
    answer is right, and one unit that differs would outweigh every rounding error.
    """
    passed: list[Tensor] = []
    relus = [module for module in trainee.model if isinstance(module, nn.ReLU)]
    handles = [relu.register_forward_hook(lambda _, __, y: passed.append(y.detach() > 0)) for relu in relus]
    trainee.forward().backward()
    for handle in handles:
        handle.remove()
    got = [_weight_gradient(layer) for layer in trainee.model if not isinstance(layer, nn.ReLU)]
    trainee.model.zero_grad(set_to_none=True)

    nets.forget_masked_weights(model)
    exact = copy.deepcopy(model).double()
    y, gates = trainee.x.double(), iter(passed)
    for layer in exact:
        y = y * next(gates) if isinstance(layer, nn.ReLU) else layer(y)
    F.mse_loss(y, trainee.target.double()).backward()
    want = [_weight_gradient(layer) for layer in exact if not isinstance(layer, nn.ReLU)]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))


def _weight_gradient(layer: Any) -> Tensor:
    """Dense [m, k], zero outside the pattern."""
    if isinstance(layer, CSBLinear):
        return layer.matrix.with_values(layer.values.grad).to_dense()
    return layer.weight.grad if "weight" in layer._parameters else layer.weight_orig.grad


def time_steps(trainee: Trainee) -> Timing:
    """Steps launched one after the other, each between two CUDA events; AdamW's step is part of it."""
    for _ in range(WARM_UP):
        trainee.step()
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS["cuda"]
    while len(seconds) < FEWEST_STEPS or (time.perf_counter() < end and len(seconds) < MOST_STEPS):
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        trainee.step()
        done.record()
        done.synchronize()
        seconds.append(begin.elapsed_time(done) * 1e-3)
    return Timing.of(seconds, "launched")


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
    plt = pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(2 + 1.3 * len(rows), 5), layout="constrained")
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
    save(figure, target)
