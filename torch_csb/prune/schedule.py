"""The cubic sparsity schedule, and the pruner that follows one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_csb._progress import progress
from torch_csb.prune.base import Pruner, install_mask, mask_of, weight_of, zero_outside


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity after t training steps, rising fast at first and slowly at the end::

        s_t = final + (initial - final) * (1 - (t - begin) / (end - begin)) ** 3

    with t held at the last update; updates are at begin, begin + frequency, ..., end. Before ``begin`` nothing is
    pruned, from ``end`` on the sparsity is ``final``. Zhu and Gupta, "To prune, or not to prune: exploring the
    efficacy of pruning for model compression" (2018).

    Args:
        initial, final: share of pruned weights at ``begin`` and ``end``, 0 <= initial <= final <= 1.
        begin, end: steps (calls of :meth:`Pruner.step`; 0 is :meth:`Pruner.prepare`), 0 <= begin <= end.
        frequency: steps from update to update, at least 1.

    Raises:
        ValueError: an argument out of range.
    """

    initial: float
    final: float
    begin: int
    end: int
    frequency: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final <= 1:
            raise ValueError(f"initial, final: expected 0 <= initial <= final <= 1, got {self.initial}, {self.final}")
        if not 0 <= self.begin <= self.end:
            raise ValueError(f"begin, end: expected 0 <= begin <= end, got {self.begin}, {self.end}")
        if self.frequency < 1:
            raise ValueError(f"frequency: expected at least 1, got {self.frequency}")

    @classmethod
    def one_shot(cls, final: float, at: int = 1) -> CubicSchedule:
        """All at once, in step ``at``."""
        return cls(final, final, at, at)

    def updates(self, t: int) -> bool:
        """Are the masks chosen anew in step t?"""
        return self.begin <= t <= self.end and ((t - self.begin) % self.frequency == 0 or t == self.end)

    def sparsity(self, t: int) -> float:
        """s_t, from 0 to 1."""
        if t < self.begin:
            return 0.0
        if t >= self.end:
            return self.final
        updated = (t - self.begin) // self.frequency * self.frequency
        left = 1.0 - updated / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3


class ScheduledPruner(Pruner):
    """Prunes the units (weights, blocks) of the lowest scores, as many as a schedule asks for.

    Args:
        schedule: the sparsity at each step.
        scope: ``"uniform"``: each layer gets the schedule's sparsity; ``"global"``: one ranking over all layers; or
            ``{layer name: final sparsity}``, a final sparsity of its own for each layer named (the schedule's for the
            others).
        filter_fn, exclude, generator: see :class:`Pruner`.

    Raises:
        ValueError: another ``scope``, or a final sparsity below the schedule's initial one or above 1; from
            :meth:`prepare` a name in ``scope`` that is no layer to prune.
    """

    def __init__(
        self, schedule: CubicSchedule, scope: str | Mapping[str, float] = "uniform", **which_layers: object
    ) -> None:
        super().__init__(**which_layers)
        if isinstance(scope, str) and scope not in ("uniform", "global"):
            raise ValueError(f"scope: expected 'uniform', 'global' or a dict of final sparsities, got {scope!r}")
        self.schedule, self.scope = schedule, scope
        finals = {} if isinstance(scope, str) else scope
        self._own = {name: replace(schedule, final=final) for name, final in finals.items()}

    def _attach(self) -> None:
        if unknown := [name for name in self._own if name not in self.layers]:
            raise ValueError(f"scope: expected names of layers to prune, got {unknown[0]!r}; see `chosen_layers`")
        # What was pruned before stays pruned, whatever its score.
        self._allowed = {name: mask_of(layer) for name, layer in self.layers.items()}
        super()._attach()
        self._start()
        self._advance()

    def _start(self) -> None:
        """Called once by prepare, when ``self._allowed`` is known."""

    @torch.no_grad()
    def _advance(self) -> None:
        if not self.schedule.updates(self.t):
            return
        kept: dict[str, Tensor] = {}
        if self.scope == "global":
            scores = [self._scores(name) for name in self.layers]
            kept = dict(zip(self.layers, keep_largest(scores, self.schedule.sparsity(self.t)), strict=True))
        else:
            for name in progress(list(self.layers), "pruning", "layers", delay=1.0):
                target = self._own.get(name, self.schedule).sparsity(self.t)
                (kept[name],) = keep_largest([self._scores(name)], target)
        frozen = self.t >= self.schedule.end
        for name, layer in self.layers.items():
            mask = self._expand(name, kept[name]) & self._allowed[name]
            if frozen:
                # Nothing returns any more: momentum and weight decay have nothing to move there either.
                zero_outside(layer, mask, self.optimizer)
            install_mask(layer, mask)

    @abstractmethod
    def _scores(self, name: str) -> Tensor:
        """A score for each unit of a layer; negative where no weight of the unit may be kept."""

    def _expand(self, name: str, units: Tensor) -> Tensor:
        """The mask of the weight, given which units are kept."""
        return units

    def _magnitudes(self, name: str) -> Tensor:
        return weight_of(self.layers[name]).abs()


def keep_largest(scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Bool masks, False at the round(sparsity * size) lowest of all scores; of equal ones the first are dropped."""
    device = scores[0].device
    pooled = torch.cat([score.flatten().to(device) for score in scores])
    kept = torch.ones_like(pooled, dtype=torch.bool)
    kept[pooled.argsort(stable=True)[: round(sparsity * pooled.numel())]] = False
    parts = kept.split([score.numel() for score in scores])
    return [part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]
