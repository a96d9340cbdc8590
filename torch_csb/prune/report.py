"""How much smaller and faster a pruned model is: in theory, and as measured."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_csb.nn import CSBConv2d, CSBLinear, _dense, densify_, sparsify_
from torch_csb.prune.scratch import detached_weights

_CSB = (CSBLinear, CSBConv2d)
_COUNTED = (nn.Linear, nn.Conv2d, *_CSB)
_TURNS = 5


@dataclass(frozen=True)
class SizeRow:
    """One layer, or the whole model.

    Attributes:
        name, kind: its qualified name and its type; ``"total"`` and ``""`` for the model.
        size, nonzeros: elements of the weight, and those that are not zero (of a CSB layer: its stored entries).
        flops, nonzero_flops: of the weight's products at the example input, 2 for each multiply-add; None without one.
        dense_us, sparse_us: median microseconds of a forward; None where it wasn't measured.
    """

    name: str
    kind: str
    size: int
    nonzeros: int
    flops: int | None = None
    nonzero_flops: int | None = None
    dense_us: float | None = None
    sparse_us: float | None = None

    @property
    def compression(self) -> float:
        """size / nonzeros."""
        return _ratio(self.size, self.nonzeros)

    @property
    def theoretical_speedup(self) -> float | None:
        """flops / nonzero_flops."""
        return None if self.flops is None else _ratio(self.flops, self.nonzero_flops)

    @property
    def measured_speedup(self) -> float | None:
        """dense_us / sparse_us."""
        return None if self.dense_us is None else self.dense_us / self.sparse_us


@dataclass
class SizeReport:
    """What :func:`report` found; ``str()`` draws a table. ``total`` counts all Parameters, biases and norms as well."""

    rows: list[SizeRow] = field(default_factory=list)
    total: SizeRow | None = None

    def __str__(self) -> str:
        head = ("layer", "type", "size", "nonzeros", "compression", "theoretical speed-up", "measured speed-up")
        lines = [
            (
                row.name,
                row.kind,
                f"{row.size:,}",
                f"{row.nonzeros:,}",
                *(_times(x) for x in (row.compression, row.theoretical_speedup, row.measured_speedup)),
            )
            for row in (*self.rows, *([] if self.total is None else [self.total]))
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        drawn = [
            "  ".join(f"{cell:{side}{width}}" for side, cell, width in zip("<<>>>>>", line, widths, strict=True))
            for line in (head, *lines)
        ]
        drawn = [line.rstrip() for line in drawn]
        rule = "-" * max(map(len, drawn))
        return "\n".join([drawn[0], rule, *drawn[1:-1], *([rule] if self.rows else []), drawn[-1]])


@torch.no_grad()
def report(model: nn.Module, example: Tensor | None = None, *, seconds: float = 1.0) -> SizeReport:
    """Compression and speed-up of a pruned model, in theory and, given an example input, as measured.

    compression = size / nonzero size; theoretical speed-up = FLOPs / nonzero FLOPs; measured speed-up = latency of the
    dense model / latency of the model with CSB layers, in eval mode without autograd. The two models are copies of
    ``model``: dense with the masks multiplied in, and that one after :func:`torch_csb.sparsify_` (what it leaves dense
    runs dense in both, about 1). The definitions are those of Blalock et al., "What is the State of Neural Network
    Pruning?" (2020).

    Args:
        model: with ``nn.Linear`` and ``nn.Conv2d`` layers, pruned or not, or their CSB layers. It is left as it is.
        example: an input of the model. Without it there are no FLOPs and nothing is timed.
        seconds: about how long to time the whole model; all layers together take about as long again.

    Returns:
        A row for each Linear and Conv2d that ran (every one without ``example``), and the total: its size and
        nonzeros count all Parameters, its FLOPs those of the rows.

    Raises:
        ValueError: a CSB layer applies an activation, which a dense layer could not; ``seconds`` is not positive.
    """
    if seconds <= 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    sizes = {
        name: (type(module).__name__, *_count(module))
        for name, module in model.named_modules()
        if isinstance(module, _COUNTED)
    }
    size, nonzeros = _all_parameters(model, sizes)
    if example is None:
        return SizeReport([SizeRow(name, *row) for name, row in sizes.items()], SizeRow("total", "", size, nonzeros))
    dense, sparse = _twins(model)
    calls = _record(dense, example, set(sizes))
    rows = []
    for name, (layer_input, positions) in calls.items():
        kind, layer_size, layer_nonzeros = sizes[name]
        flops = (2 * layer_size * positions, 2 * layer_nonzeros * positions)
        pair = [twin.get_submodule(name) if name else twin for twin in (dense, sparse)]
        times = _medians_us(pair, layer_input, seconds / len(calls))
        rows.append(SizeRow(name, kind, layer_size, layer_nonzeros, *flops, *times))
    flops = (sum(row.flops for row in rows), sum(row.nonzero_flops for row in rows))
    times = _medians_us([dense, sparse], example, seconds)
    return SizeReport(rows, SizeRow("total", "", size, nonzeros, *flops, *times))


def _count(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, _CSB):
        return module.weight.numel(), module.nnz
    # Under a mask the attribute `weight` is of the last forward; an optimizer may have stepped since.
    masked = _dense.is_pruned(module, "weight")
    weight = module.weight_orig * module.weight_mask if masked else module.weight
    return weight.numel(), int(weight.count_nonzero())


def _all_parameters(model: nn.Module, sizes: dict[str, tuple[str, int, int]]) -> tuple[int, int]:
    modules = dict(model.named_modules())
    size = nonzeros = 0
    counted: set[int] = set()
    for name, (_, layer_size, layer_nonzeros) in sizes.items():
        module = modules[name]
        weight = module.values if isinstance(module, _CSB) else _dense.weight_parameter(module)
        if id(weight) in counted:  # tied: the model holds it once
            continue
        size, nonzeros = size + layer_size, nonzeros + layer_nonzeros
        if weight is not None:
            counted.add(id(weight))
        if "parametrizations" in module._modules:  # what it computes counts, not what it computes it from
            counted.update(map(id, module.parametrizations.parameters()))
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in counted)
    return size + others, nonzeros + others


def _twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The dense model and the one with CSB layers, both copies in eval mode."""
    dense = copy.deepcopy(model, detached_weights(model)).eval()
    for module in dense.modules():
        for name in ("weight", "bias"):
            if _dense.is_pruned(module, name):
                prune.remove(module, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # A layer or model that stays dense is a result, too.
        if isinstance(model, _CSB):
            return dense.to_dense(), dense
        sparse = copy.deepcopy(dense)
        if any(isinstance(module, _CSB) for module in dense.modules()):
            densify_(dense)
        elif type(sparse) not in (nn.Linear, nn.Conv2d):  # sparsify_ replaces layers inside a model only
            sparsify_(sparse)
    return dense, sparse


def _record(model: nn.Module, example: Tensor, names: set[str]) -> dict[str, tuple[Tensor, int]]:
    """First input of each named layer, and over how many positions its weight was applied in all its calls."""
    calls: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            first, positions = calls.get(name, (args[0], 0))
            calls[name] = (first, positions + output.numel() // width)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name in names]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _medians_us(models: list[nn.Module], example: Tensor, seconds: float) -> list[float]:
    """Median time of a forward; the models take turns, so that a busy moment hits them all alike."""
    synchronize = torch.cuda.synchronize if example.is_cuda else lambda: None
    taken: list[list[float]] = [[] for _ in models]
    for turn in range(1 + _TURNS):
        for model, times in zip(models, taken, strict=True):
            synchronize()
            deadline = time.perf_counter() + seconds / ((1 + _TURNS) * len(models))
            while True:
                start = time.perf_counter()
                model(example)
                synchronize()
                end = time.perf_counter()
                if turn > 0:  # The first turn warms up.
                    times.append(end - start)
                if end > deadline:
                    break
    return [1e6 * statistics.median(times) for times in taken]


def _ratio(whole: int, part: int) -> float:
    return whole / part if part else (float("inf") if whole else 1.0)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
