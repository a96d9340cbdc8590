"""The pruning methods that `bench prune` compares, each as it is set up for digits, and what one run of them does."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torch_csb
from torch_csb.bench import digits
from torch_csb.bench.digits import Data, DigitsNet, accuracy, fit, overall_sparsity, ramp_end
from torch_csb.prune import (
    L0,
    BlockMagnitude,
    Coarse,
    CubicSchedule,
    GradualMagnitude,
    GradualRandom,
    Pruner,
    VariationalDropout,
    save_compressed,
    scratch_control,
    share_,
)

DENSE_LR, PRUNE_LR, TUNE_LR = 2e-3, 1e-3, 5e-4
UPDATES, SEARCHES = 24, 6
BITS = 4
# Decimals of what is measured; what stands here fills the columns of a row.
DECIMALS = {"accuracy_dense": 2, "accuracy_pruned": 2, "accuracy_csb": 2, "achieved_sparsity": 4, "seconds": 2}


class Task(NamedTuple):
    """What a method is set up for: a sparsity, the training that it gets, and its random numbers."""

    data: Data
    sparsity: float
    epochs: int
    generator: torch.Generator

    def gradual(self, updates: int = UPDATES) -> CubicSchedule:
        """From no zeros to all of them over the ramp, in about so many updates."""
        end = ramp_end(self.epochs, self.data)
        return CubicSchedule(0.0, self.sparsity, 0, end, max(1, end // updates))

    def one_shot(self) -> CubicSchedule:
        return CubicSchedule.one_shot(self.sparsity, at=0)

    def learned(self) -> dict[str, Any]:
        """For a method with a penalty: it grows over the first half of the ramp."""
        return {"warmup": (0, ramp_end(self.epochs, self.data) // 2), "generator": self.generator, **_ALL}

    def error(self, model: nn.Module) -> float:
        return 1 - accuracy(model, self.data.choice_x, self.data.choice_y) / 100


# These penalties lead near the sparsity that is asked for; the cut at the end of the ramp does the rest. Their factors
# were chosen on the images that choose masks, from another seed than those of the benchmark.
def _variational(task: Task) -> Sequence[Pruner]:
    weight = 4e-6 / (1 - task.sparsity)
    return [VariationalDropout(weight, log_sigma2=-8.0, lr=1e-2, **task.learned())]


def _l0(task: Task) -> Sequence[Pruner]:
    weight = 5e-6 / (1 - task.sparsity)
    return [L0(weight, dropout_rate=0.3, lr=5e-2, **task.learned())]


def _coarse(task: Task) -> Sequence[Pruner]:
    return [Coarse(task.gradual(SEARCHES), task.error, generator=task.generator, **_ALL)]


def _coarse_kernel(task: Task) -> Sequence[Pruner]:
    # A Linear layer has no kernels: it gives up whole features.
    kernels = Coarse(task.gradual(SEARCHES), task.error, "kernel", generator=task.generator, **_ALL)
    maps = Coarse(
        task.gradual(SEARCHES), task.error, filter_fn=lambda name, _: name == "hidden", generator=task.generator
    )
    return [kernels, maps]


_ALL = {"exclude": digits.KEPT_DENSE}
METHODS: dict[str, Callable[[Task], Sequence[Pruner]]] = {
    "magnitude": lambda task: [GradualMagnitude(task.gradual(), **_ALL)],
    "magnitude-global": lambda task: [GradualMagnitude(task.gradual(), "global", **_ALL)],
    "magnitude-one-shot": lambda task: [GradualMagnitude(task.one_shot(), **_ALL)],
    "variational": _variational,
    "l0": _l0,
    "block-4x1": lambda task: [BlockMagnitude(task.gradual(), (4, 1), **_ALL)],
    "block-8x8": lambda task: [BlockMagnitude(task.gradual(), 8, **_ALL)],
    "coarse": _coarse,
    "coarse-kernel": _coarse_kernel,
    "random": lambda task: [GradualRandom(task.gradual(), generator=task.generator, **_ALL)],
    "random-one-shot": lambda task: [GradualRandom(task.one_shot(), generator=task.generator, **_ALL)],
}
SCRATCH, SHARED = "scratch", f"magnitude-{BITS}-bit"
# These two start from what ``magnitude`` left.
NAMES = (*METHODS, SCRATCH, SHARED)
CONTROLS = ("random", "random-one-shot", SCRATCH)


class Runs:
    """The runs of one seed: they share a dense net, and ``scratch`` and the 4-bit net what ``magnitude`` left."""

    def __init__(self, data: Data, epochs: int, seed: int) -> None:
        self.data, self.epochs, self.seed = data, epochs, seed
        torch.manual_seed(seed)
        self.dense = DigitsNet().to(data.train_x.device)
        fit(self.dense, data, epochs, DENSE_LR, seed)
        self.accuracy_dense = self._accuracy(self.dense)
        self._magnitude: dict[float, tuple[nn.Module, dict[str, Tensor]]] = {}

    def run(self, method: str, sparsity: float) -> dict[str, float | int | None]:
        """The accuracies, sparsity, bytes and seconds of a row."""
        if method in (SCRATCH, SHARED) and sparsity not in self._magnitude:
            self._pruned_and_tuned("magnitude", sparsity)
        start = time.perf_counter()
        sizes: dict[str, int | None] = dict.fromkeys(("bytes_dense", "bytes_csb", "bytes_codes", "bytes_file"))
        if method == SHARED:
            pruned, model, masks = self._share(sparsity)
            sizes = _bytes(model)
        else:
            pruned, model, masks = self._pruned_and_tuned(method, sparsity)
        numbers = {"accuracy_dense": self.accuracy_dense, "accuracy_pruned": pruned}
        numbers |= {"accuracy_csb": self._accuracy(model), "achieved_sparsity": overall_sparsity(masks)}
        numbers["seconds"] = time.perf_counter() - start
        return {name: round(number, DECIMALS[name]) for name, number in numbers.items()} | sizes

    def _pruned_and_tuned(self, method: str, sparsity: float) -> tuple[float, nn.Module, dict[str, Tensor]]:
        model, masks = self._scratch(sparsity) if method == SCRATCH else self._prune(method, sparsity)
        pruned = self._accuracy(model)
        # Whatever a layer's own share of zeros, so that every method is fine-tuned in the same form.
        where = self.data.train_x.device.type
        torch_csb.sparsify_(model, min_sparsity=0.0, exclude=digits.KEPT_DENSE, target=where, progress=False)
        fit(model, self.data, max(1, self.epochs // 3), TUNE_LR, self.seed + 2)
        if method == "magnitude":
            self._magnitude[sparsity] = model, masks
        return pruned, model, masks

    def _prune(self, method: str, sparsity: float) -> tuple[nn.Module, dict[str, Tensor]]:
        model = copy.deepcopy(self.dense)
        pruners = METHODS[method](Task(self.data, sparsity, self.epochs, torch.Generator().manual_seed(self.seed)))
        return model, fit(model, self.data, self.epochs, PRUNE_LR, self.seed + 1, pruners, sparsity)

    def _scratch(self, sparsity: float) -> tuple[nn.Module, dict[str, Tensor]]:
        masks = self._magnitude[sparsity][1]
        model = scratch_control(self.dense, masks, torch.Generator().manual_seed(self.seed))
        fit(model, self.data, 2 * self.epochs, DENSE_LR, self.seed)
        return model, masks

    def _share(self, sparsity: float) -> tuple[float, nn.Module, dict[str, Tensor]]:
        start, masks = self._magnitude[sparsity]
        model = copy.deepcopy(start)
        sharing = share_(model, BITS, progress=False)
        fit(model, self.data, max(1, self.epochs // 3), TUNE_LR, self.seed + 3, after_step=sharing.step)
        sharing.finish()
        return self._accuracy(start), model, masks

    def _accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.data.test_x, self.data.test_y)


def _bytes(model: nn.Module) -> dict[str, int | None]:
    with tempfile.TemporaryDirectory() as folder:
        sizes = save_compressed(model, Path(folder) / "model.csbz", progress=False)
    return {f"bytes_{what}": size for what, size in sizes._asdict().items()}
