"""What variational dropout and L0 share: a trained number beside each weight, a penalty on it, and a cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from torch_csb.nn import _dense
from torch_csb.prune.base import Pruner, mask_of, weight_of


class LearnedGate(nn.Module):
    """A parametrization ``weight = g(θ)`` with one trained number for each weight; θ is the layer's own Parameter.

    Args:
        start: the first values of that number, shape of the weight.
        kept: a mask of zeros and ones from before, or None: what it prunes stays pruned.
        cutoff: weights with a score above it are kept.
    """

    least_cutoff = -torch.inf

    def __init__(self, name: str, start: Tensor, kept: Tensor | None, cutoff: float) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(start))
        self.cutoff = cutoff
        # In the weight's dtype: DistributedDataParallel broadcasts it on every backend.
        self.register_buffer("kept", kept)

    def forward(self, theta: Tensor) -> Tensor:
        weight = self.trained(theta) if self.training else self.final(theta)
        return weight if self.kept is None else weight * self.kept

    def trained(self, theta: Tensor) -> Tensor:
        """The weight in training mode."""
        raise NotImplementedError

    def final(self, theta: Tensor) -> Tensor:
        """The weight in evaluation mode."""
        raise NotImplementedError

    def scores(self, theta: Tensor) -> Tensor:
        """How much each weight is worth keeping."""
        raise NotImplementedError

    def selects(self, theta: Tensor) -> Tensor:
        """Which weights are kept, bool."""
        selected = self.scores(theta) > self.cutoff
        return selected if self.kept is None else selected & (self.kept != 0)

    def costs(self, theta: Tensor) -> Tensor:
        """What each weight adds to the penalty."""
        raise NotImplementedError


class LearnedPruner(Pruner):
    """A :class:`Pruner` whose masks are learned by gradient descent, with one :class:`LearnedGate` for each layer.

    The trained numbers join ``optimizer`` at :meth:`prepare` as a parameter group without weight decay (a prior of
    their own acts on them), which :meth:`finish` empties. Make a learning rate scheduler after :meth:`prepare`. With
    no optimizer given, make it afterwards from ``model.parameters()``.
    """

    def __init__(self, weight: float, *, warmup: tuple[int, int], lr: float | None, **choice: Any) -> None:
        super().__init__(**choice)
        if not weight >= 0:
            raise ValueError(f"weight: expected a number from 0, got {weight!r}")
        if lr is not None and not lr >= 0:
            raise ValueError(f"lr: expected None or a number from 0, got {lr!r}")
        if not (len(warmup) == 2 and 0 <= warmup[0] <= warmup[1]):
            raise ValueError(f"warmup: expected (begin, end) with 0 <= begin <= end, got {warmup!r}")
        self.weight, self.warmup, self.lr = weight, warmup, lr
        self._group: dict[str, Any] | None = None

    @abstractmethod
    def _gate(self, theta: nn.Parameter, kept: Tensor | None) -> LearnedGate:
        """The parametrization of one weight."""

    def penalty(self) -> Tensor:
        """``weight`` · ramp · Σ cost over all weights; the ramp rises from 0 to 1 between the steps of ``warmup``."""
        self._check_running("penalty")
        sums = []
        for gate, theta in self._gates().values():
            costs = gate.costs(theta)
            sums.append((costs if gate.kept is None else costs * gate.kept).sum())
        return self._factor() * torch.stack([each.to(sums[0].device) for each in sums]).sum()

    @torch.no_grad()
    def cut(self, sparsity: float) -> None:
        """Moves the cutoff of log α so that round(sparsity · n) of all n weights fall to it, over all layers together.

        What the penalty leads to depends on its weight and on the time it had; this ends at a sparsity that is asked
        for. Call it before :meth:`finish`, and train on afterwards where it prunes much more than the penalty did.
        Weights of equal log α go together; what L0 gave a gate of 0 stays pruned.

        Raises:
            ValueError: ``sparsity`` is not between 0 and 1.
        """
        self._check_running("cut")
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity: expected a number from 0 to 1, got {sparsity!r}")
        scores = []
        for gate, theta in self._gates().values():
            score = gate.scores(theta)
            if gate.kept is not None:
                score = score.masked_fill(gate.kept == 0, -torch.inf)
            scores.append(score.flatten().cpu())
        pooled = torch.cat(scores).sort().values
        pruned = round(sparsity * len(pooled))
        cutoff = float(pooled[pruned - 1]) if pruned else -torch.inf
        for gate, _ in self._gates().values():
            gate.cutoff = max(cutoff, gate.least_cutoff)

    def _factor(self) -> float:
        begin, end = self.warmup
        if self.t >= end:
            return self.weight
        return self.weight * max(0, self.t - begin) / (end - begin)

    def _gates(self) -> dict[str, tuple[LearnedGate, nn.Parameter]]:
        lists = {name: layer.parametrizations["weight"] for name, layer in self.layers.items()}
        return {name: (each[0], each.original) for name, each in lists.items()}

    def _attach(self) -> None:
        gates = {}
        for name, layer in self.layers.items():
            theta, pruned = weight_of(layer), _dense.is_pruned(layer, "weight")
            gate = self._gate(theta, mask_of(layer).to(theta.dtype) if pruned else None)
            gates[name] = gate.train(layer.training)
        if self.optimizer is not None:
            self._join(self.optimizer, [parameter for gate in gates.values() for parameter in gate.parameters()])
        for name, layer in self.layers.items():
            if _dense.is_pruned(layer, "weight"):
                prune.remove(layer, "weight")
            # unsafe skips a trial call, which would draw random numbers.
            parametrize.register_parametrization(layer, "weight", gates[name], unsafe=True)

    def _join(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        group: dict[str, Any] = {"params": parameters}
        if "lr" in optimizer.defaults:
            group["lr"] = optimizer.param_groups[0]["lr"] if self.lr is None else self.lr
        if "weight_decay" in optimizer.defaults:
            group["weight_decay"] = 0.0
        optimizer.add_param_group(group)
        self._group = optimizer.param_groups[-1]

    def _advance(self) -> None:
        """The optimizer has moved what the masks are made of."""

    @torch.no_grad()
    def _current_masks(self) -> dict[str, Tensor]:
        return {name: gate.selects(theta) for name, (gate, theta) in self._gates().items()}

    def _detach(self) -> None:
        for name, (gate, theta) in self._gates().items():
            # In place: the storage of the Parameter may be known elsewhere too.
            theta.copy_(gate.eval()(theta))
            parametrize.remove_parametrizations(self.layers[name], "weight", leave_parametrized=False)
        if self._group is not None:
            for parameter in self._group["params"]:
                self.optimizer.state.pop(parameter, None)
            # The group itself stays: a learning rate scheduler counts on the number of groups.
            self._group["params"] = []


def draw(sample: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers of the shape and dtype of ``like``, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return sample(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)
