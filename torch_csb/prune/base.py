"""What every pruning method shares: which layers it prunes, its verbs, and how masks are held afterwards.

Masks are those of ``torch.nn.utils.prune``. The sparsifiers of ``torch.ao.pruning`` hold theirs as parametrizations,
which ``sparsify_`` can't read before they are multiplied in, and know nothing of the optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_csb.nn import _dense
from torch_csb.nn._choice import excluded_modules, shared_weights

Exclude = str | nn.Module | Iterable[str | nn.Module]


class Pruner(ABC):
    """A way to find masks while a model trains: prepare once, step after each ``optimizer.step()``, finish::

        pruner = Method(...).prepare(model, optimizer)
        for x, y in batches:
            optimizer.zero_grad()
            (loss(model(x), y) + pruner.penalty()).backward()
            optimizer.step()
            pruner.step()
        masks = pruner.finish()
        torch_csb.sparsify_(model)

    A subclass writes :meth:`_advance` and, where it needs more than ``nn.utils.prune`` masks, :meth:`_attach`,
    :meth:`_current_masks` and :meth:`_detach`.

    Args:
        filter_fn: called with (name, module); a layer for which it is false is left alone.
        exclude: names (``"head"``), patterns (``"decoder.*.out"``) or modules to leave alone, with all inside them.
        generator: source of all random numbers of the method, on any device; None takes torch's default one.

    Attributes:
        layers: after :meth:`prepare`, qualified name -> layer (see :func:`chosen_layers`).
        t: how often :meth:`step` was called.
    """

    def __init__(
        self,
        *,
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        exclude: Exclude = (),
        generator: torch.Generator | None = None,
    ) -> None:
        self._filter_fn, self._exclude = filter_fn, exclude
        self.generator = generator
        self.layers: dict[str, nn.Module] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.t = 0
        self._final: dict[str, Tensor] | None = None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Takes hold of the layers of ``model``; call it before ``torch.compile`` and DistributedDataParallel.

        Weights stay the same Parameters, so ``optimizer`` goes on training them. Given, it also lets :meth:`finish`
        clear the momenta of pruned weights. Masks that the layers already have are kept: what they prune stays pruned.

        Returns:
            The pruner itself.

        Raises:
            RuntimeError: called twice.
            ValueError: no layer is left to prune, or ``optimizer`` trains none of them.
        """
        if self.layers:
            raise RuntimeError(f"prepare: expected one call, got a second; make a new {type(self).__name__}")
        layers = chosen_layers(model, self._filter_fn, self._exclude)
        if optimizer is not None:
            trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if not any(id(weight_of(layer)) in trained for layer in layers.values()):
                raise ValueError("optimizer: expected one that trains the model's weights, got one that trains none")
        tensors = [(layer, tensor) for layer in layers.values() for tensor in ("weight", "bias")]
        unmasked = [(layer, tensor) for layer, tensor in tensors if not _dense.is_pruned(layer, tensor)]
        self.layers, self.optimizer = layers, optimizer
        try:
            self._attach()
        except BaseException:
            for layer, tensor in unmasked:
                if _dense.is_pruned(layer, tensor):
                    prune.remove(layer, tensor)
            self.layers, self.optimizer = {}, None
            raise
        return self

    def step(self) -> None:
        """Counts one training step, and moves the masks where the method's time has come."""
        self._check_running("step")
        self.t += 1
        self._advance()

    def penalty(self) -> Tensor:
        """What the method adds to the loss: a scalar, 0 for a method without a regularizer."""
        self._check_running("penalty")
        return torch.zeros((), device=weight_of(next(iter(self.layers.values()))).device)

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Makes the masks final; the layers hold them as ``torch.nn.utils.prune`` masks, as ``sparsify_`` reads them.

        Weights, their gradients and the tensors of the optimizer's state become exactly zero outside the masks, and
        stay so: later steps of that optimizer, with momentum and weight decay, move nothing there.

        Returns:
            Qualified name of each layer -> bool mask, shape of the weight, True where a weight is kept.
        """
        self._check_running("finish")
        masks = self.masks
        self._detach()
        for name, layer in self.layers.items():
            zero_outside(layer, masks[name], self.optimizer)
            install_mask(layer, masks[name])
        self._final = masks
        return dict(masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks of now: bool, shape of the weight, True where a weight is kept."""
        return dict(self._final) if self._final is not None else self._current_masks()

    def sparsity(self) -> dict[str, float]:
        """Share of pruned weights in each layer, from 0 to 1."""
        return {name: 1.0 - int(mask.sum()) / max(mask.numel(), 1) for name, mask in self.masks.items()}

    def _attach(self) -> None:
        """Prepares ``self.layers``; on an error it leaves them as they were, but for masks without a zero."""
        for layer in self.layers.values():
            install_mask(layer, mask_of(layer))

    @abstractmethod
    def _advance(self) -> None:
        """One step; ``self.t`` is already its number, from 1."""

    def _current_masks(self) -> dict[str, Tensor]:
        return {name: mask_of(layer) for name, layer in self.layers.items()}

    def _detach(self) -> None:  # noqa: B027 - most methods have nothing to remove
        """Removes hooks and parametrizations of the method's own; each layer then has a weight of the right values."""

    def _check_running(self, verb: str) -> None:
        if not self.layers:
            raise RuntimeError(f"{verb}: expected a prepared pruner; call prepare(model, optimizer) first")
        if self._final is not None:
            raise RuntimeError(f"{verb}: expected a running pruner, got a finished one; make a new one")


def chosen_layers(
    model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None, exclude: Exclude = ()
) -> dict[str, nn.Module]:
    """The layers to prune, by qualified name: each ``nn.Linear`` and ``nn.Conv2d`` that is not left out.

    Subclasses, parametrized layers, layers inside ``nn.MultiheadAttention`` and weights that modules share are never
    chosen: they may be read where no mask applies.

    Raises:
        ValueError: no layer is left, or ``exclude`` names a module that the model doesn't have.
    """
    excluded, shared = excluded_modules(model, exclude), shared_weights(model)
    chosen = {}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Conv2d) or id(module) in excluded:
            continue
        weight = weight_of(module)
        if weight is None or id(weight) in shared or (filter_fn is not None and not filter_fn(name, module)):
            continue
        chosen[name] = module
    if not chosen:
        raise ValueError("model: expected an nn.Linear or nn.Conv2d to prune, got none; look at filter_fn and exclude")
    return chosen


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The trained tensor behind ``layer.weight``: ``weight_orig`` where ``nn.utils.prune`` holds a mask."""
    return _dense.weight_parameter(layer)


def mask_of(layer: nn.Module) -> Tensor:
    """A copy of the layer's ``nn.utils.prune`` mask, bool; all True where it has none."""
    if _dense.is_pruned(layer, "weight"):
        return layer.weight_mask != 0
    return torch.ones_like(weight_of(layer), dtype=torch.bool)


@torch.no_grad()
def install_mask(layer: nn.Module, mask: Tensor) -> None:
    """Holds ``mask`` (shape of the weight) by ``torch.nn.utils.prune``, in place of the one that is there.

    The weight stays the same Parameter with the same values, under the name ``weight_orig``.

    Raises:
        ValueError: the mask has another shape.
    """
    weight = weight_of(layer)
    if mask.shape != weight.shape:
        raise ValueError(f"mask: expected shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if not _dense.is_pruned(layer, "weight"):
        prune.custom_from_mask(layer, "weight", mask.to(weight.device))
        return
    # In place: a compiled model and DistributedDataParallel hold the very buffer.
    layer.weight_mask.copy_(mask)
    layer.weight = weight * layer.weight_mask.to(weight.dtype)


@torch.no_grad()
def zero_outside(layer: nn.Module, mask: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Makes weight, gradient and optimizer state exactly zero where ``mask`` is False.

    Raises:
        ValueError: the mask has another shape than the weight.
    """
    weight = weight_of(layer)
    if mask.shape != weight.shape:
        raise ValueError(f"mask: expected shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    outside = ~mask.to(weight.device, torch.bool)
    weight.masked_fill_(outside, 0)
    if weight.grad is not None:
        weight.grad.masked_fill_(outside, 0)
    if optimizer is not None:
        zero_optimizer_state(optimizer, weight, mask)


@torch.no_grad()
def zero_optimizer_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, mask: Tensor) -> None:
    """Zeroes each tensor of ``parameter``'s shape in its optimizer state (momenta) where ``mask`` is False."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(~mask.to(value.device, torch.bool), 0)
