"""Coarse pruning: whole feature maps or k x k kernels, the best of some random candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_csb._progress import progress
from torch_csb.nn import _dense
from torch_csb.prune.base import Exclude, Pruner, install_mask, zero_optimizer_state, zero_outside
from torch_csb.prune.schedule import CubicSchedule

UNITS = ("feature_map", "kernel")


@dataclass(frozen=True)
class Candidate:
    """One candidate mask of an update, a row of :attr:`Coarse.log`.

    Attributes:
        step: the step of the update.
        seed: of the generator that drew it.
        sparsity: share of weights that it prunes, over all layers.
        error: what ``eval_fn`` returned.
        chosen: whether it became the mask.
    """

    step: int
    seed: int
    sparsity: float
    error: float
    chosen: bool


class Coarse(Pruner):
    """Prunes whole units at random, the best of N random candidate masks at each update.

    At each update of the schedule, N candidates are drawn; each prunes round(s_t · units) units of every layer: those
    pruned before and others drawn uniformly from the rest. The one with the lowest ``eval_fn(model)`` becomes the
    mask, of equal ones the first. Nothing returns. S. Anwar and W. Sung, "Compact Deep Convolutional Neural Networks
    With Coarse Pruning" (2016).

    A *feature map* is an output channel of an ``nn.Conv2d`` or an output feature of an ``nn.Linear``. Its bias is
    pruned with it, so that the layers behind, which keep their shapes, are fed zeros (a normalisation between them
    still adds its own shift; in a CSB layer the bias is an ordinary Parameter, which training may move again). Leave
    the classifier out by ``exclude``. A *kernel* is the k x k weights from one input
    channel to one output channel of an ``nn.Conv2d``; other layers are left alone.

    It starts from masks that the layers have: prune feature maps, finish, then kernels or weights by another method.

    Args:
        schedule: share of pruned units of each layer at each step; units whose weights are all pruned already count.
        eval_fn: called with the model in evaluation mode and without gradients, returns the misclassification rate (or
            another loss) on validation data, which training doesn't see. In distributed training it must return the
            same number in every process, and the generators must have the same seed.
        units: ``"feature_map"`` or ``"kernel"``.
        candidates: N, at least 1; with 1 this is random pruning of units.
        filter_fn, exclude, generator: see :class:`Pruner`; the generator draws the seeds of the candidates.

    Attributes:
        log: all candidates of all updates, a :class:`Candidate` each.

    Raises:
        ValueError: an argument out of range; from an update, ``eval_fn`` returned NaN or infinity.
    """

    def __init__(
        self,
        schedule: CubicSchedule,
        eval_fn: Callable[[nn.Module], float],
        units: str = "feature_map",
        *,
        candidates: int = 20,
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        exclude: Exclude = (),
        generator: torch.Generator | None = None,
    ) -> None:
        if units not in UNITS:
            raise ValueError(f"units: expected 'feature_map' or 'kernel', got {units!r}")
        if candidates < 1:
            raise ValueError(f"candidates: expected at least 1, got {candidates}")

        def takes(name: str, module: nn.Module) -> bool:
            fits = units == "feature_map" or isinstance(module, nn.Conv2d)
            return fits and (filter_fn is None or filter_fn(name, module))

        super().__init__(filter_fn=takes, exclude=exclude, generator=generator)
        self.schedule, self.eval_fn, self.units, self.candidates = schedule, eval_fn, units, candidates
        self.log: list[Candidate] = []

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Coarse:
        if not self.layers:
            self._model = model
        return super().prepare(model, optimizer)

    def _attach(self) -> None:
        biases = {name: _dense.bias_parameter(layer) for name, layer in self.layers.items()}
        # Of a kernel's channel other inputs are left, so its bias stays.
        self._biases = {name: bias for name, bias in biases.items() if bias is not None and self.units != "kernel"}
        self._allowed_bias = {name: _bias_mask_of(self.layers[name]) for name in self._biases}
        self._install(self.masks)
        self._advance()

    @torch.no_grad()
    def _advance(self) -> None:
        if not self.schedule.updates(self.t):
            return
        self._search(self.schedule.sparsity(self.t))
        # Nothing returns, so momentum and weight decay have nothing to move there either.
        for name, mask in self.masks.items():
            zero_outside(self.layers[name], mask, self.optimizer)
            if name in self._biases:
                self._zero_bias(self._biases[name], self._kept_units(mask) & self._allowed_bias[name])

    def _search(self, sparsity: float) -> None:
        start = best = self.masks
        kept = {name: self._kept_units(mask) for name, mask in start.items()}
        excess = {name: round(sparsity * units.numel()) - int((~units).sum()) for name, units in kept.items()}
        if max(excess.values()) <= 0:
            return
        device = None if self.generator is None else self.generator.device
        seeds = torch.randint(2**63 - 1, (self.candidates,), generator=self.generator, device=device).tolist()
        modes = {module: module.training for module in self._model.modules()}
        rows: list[Candidate] = []
        self._model.eval()
        try:
            for seed in progress(seeds, "coarse pruning", "candidates", delay=1.0):
                masks = self._draw(start, kept, excess, seed)
                self._install(masks)
                error = float(self.eval_fn(self._model))
                if not math.isfinite(error):
                    raise ValueError(f"eval_fn: expected a finite number, the lower the better, got {error}")
                if all(error < row.error for row in rows):
                    best = masks
                rows.append(Candidate(self.t, seed, _sparsity(masks), error, False))
        except BaseException:
            best = start
            raise
        finally:
            self._install(best)
            for module, mode in modes.items():
                module.training = mode
        chosen = min(rows, key=lambda row: row.error)
        self.log += [replace(row, chosen=row is chosen) for row in rows]

    def _draw(
        self, start: dict[str, Tensor], kept: dict[str, Tensor], excess: dict[str, int], seed: int
    ) -> dict[str, Tensor]:
        # On the CPU whatever the model's device, so that a seed means the same mask everywhere.
        generator = torch.Generator().manual_seed(seed)
        masks = {}
        for name, mask in start.items():
            units = kept[name].clone()
            alive = units.flatten().nonzero().flatten()
            order = torch.randperm(len(alive), generator=generator).to(alive.device)
            units.view(-1)[alive[order[: max(0, excess[name])]]] = False
            masks[name] = mask & units.view(*units.shape, *[1] * (mask.dim() - units.dim()))
        return masks

    def _kept_units(self, mask: Tensor) -> Tensor:
        """[output channels] or [output channels, input channels]: has a unit a weight left?"""
        return mask.flatten(1).any(1) if self.units == "feature_map" else mask.flatten(2).any(2)

    def _install(self, masks: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            install_mask(self.layers[name], mask)
            if name in self._biases:
                _install_bias_mask(self.layers[name], self._kept_units(mask) & self._allowed_bias[name])

    def _zero_bias(self, bias: nn.Parameter, kept: Tensor) -> None:
        bias.masked_fill_(~kept, 0)
        if bias.grad is not None:
            bias.grad.masked_fill_(~kept, 0)
        if self.optimizer is not None:
            zero_optimizer_state(self.optimizer, bias, kept)


def _sparsity(masks: dict[str, Tensor]) -> float:
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def _bias_mask_of(layer: nn.Module) -> Tensor:
    if _dense.is_pruned(layer, "bias"):
        return layer.bias_mask != 0
    return torch.ones_like(_dense.bias_parameter(layer), dtype=torch.bool)


@torch.no_grad()
def _install_bias_mask(layer: nn.Module, mask: Tensor) -> None:
    if not _dense.is_pruned(layer, "bias"):
        prune.custom_from_mask(layer, "bias", mask)
        return
    layer.bias_mask.copy_(mask)
    layer.bias = _dense.bias_parameter(layer) * layer.bias_mask
