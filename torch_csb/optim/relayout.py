from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_csb import convert
from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _state
from torch_csb.nn._layer import CSBLayer
from torch_csb.optim._state import check_optimizer, moved, trained


@dataclass
class _Change:
    name: str
    layer: CSBLayer
    matrix: CSBMatrix
    grad: Tensor | None
    state: dict[str, Any] | None


@torch.no_grad()
def relayout_(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    target: str = "auto",
    block_size: int | None = None,
    encoding: str | None = None,
) -> list[str]:
    """Packs the CSB layers of ``model`` anew for another machine: CPUs want larger blocks than GPUs, and no bitmaps.

    Values, their gradients and the optimizer's moments are put into the new entry order together, so none of them ever
    meets another order. Every ``values`` stays the same Parameter, if of another length (padding), and the optimizer
    and its schedulers go on. ``to(device)`` and ``load_state_dict`` keep a layout; this alone changes it. What was
    made for the old arrays has to be made again: CUDA graphs, exported programs, DistributedDataParallel.

    Args:
        model: a model, or a CSB layer itself.
        optimizer: the one that trains the model; needed where gradients show that there is one.
        target: ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA where torch has it), where the model will run.
        block_size: a power of two from 2 to 256; default by ``target``.
        encoding: ``"codes"``, or ``"bitmap"`` in blocks of 64; default by target, dtype and each layer's density.

    Returns:
        Names of the layers that changed, empty where all have that layout already.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: ``values`` has a gradient and no optimizer is given, or one that trains none of the layers; a state
            that is not one number for each element; ``values`` is shared, sharded, on the meta device or has gradient
            hooks, which may know the order; a bad ``target``, ``block_size`` or ``encoding``. Nothing is changed then.
    """
    rule = convert.choose_layout(block_size, target, encoding)
    if optimizer is not None:
        check_optimizer(optimizer)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSBLayer)}
    held = {id(parameter) for parameter in trained(optimizer)} if optimizer is not None else set()
    if optimizer is not None and layers and not any(id(layer.values) in held for layer in layers.values()):
        raise ValueError("optimizer: expected the one that trains the model's values, got one that trains none of them")
    wanted = {name: _wanted(layer, rule) for name, layer in layers.items()}
    changes = [
        _prepare(name, layer, wanted[name], optimizer)
        for name, layer in layers.items()
        if layer._layout != wanted[name]
    ]
    owners: dict[int, str] = {}
    for change in changes:
        if (other := owners.setdefault(id(change.layer.values), change.name)) != change.name:
            raise ValueError(f"{change.name}.values: expected values of its own, they are those of {other} too")
    for change in changes:
        _apply(change, optimizer)
    return [change.name for change in changes]


def _wanted(layer: CSBLayer, rule: convert.LayoutRule) -> Layout:
    # Where there is no data nothing can be counted, and nothing be packed either.
    nnz = 0 if layer.values.is_meta or layer._unfilled else layer.nnz
    return rule.layout(layer.values.dtype, nnz, layer.m * layer.k)


def _prepare(name: str, layer: CSBLayer, layout: Layout, optimizer: torch.optim.Optimizer | None) -> _Change:
    full, values = f"{name}.values" if name else "values", layer.values
    if values.is_meta:
        raise ValueError(f"{full}: expected data, it is on the meta device; load the model first")
    if type(values.data) is not Tensor:
        kind = type(values.data).__name__
        raise ValueError(f"{full}: expected a plain tensor, got a {kind}; change the layout before sharding")
    if values._backward_hooks or values._post_accumulate_grad_hooks:
        raise ValueError(
            f"{full}: it has gradient hooks, which may know the order of the entries (those of share_ do); "
            "remove them first"
        )
    if values.grad is not None and optimizer is None:
        raise ValueError(
            f"{full}: it has a gradient, so an optimizer may hold moments in the old order: pass optimizer=…, or, "
            "where there is none, call model.zero_grad(set_to_none=True) first"
        )
    matrix, move = _repacked(layer.matrix, layout)
    grad = None if values.grad is None else move(values.grad)
    state = None
    if optimizer is not None and values in optimizer.state:
        state = moved(optimizer.state[values], values.shape, move, full, optimizer)
    return _Change(name, layer, matrix, grad, state)


def _repacked(matrix: CSBMatrix, layout: Layout) -> tuple[CSBMatrix, Callable[[Tensor], Tensor]]:
    """The matrix in another layout, and what brings ``[stored]`` of the old one into the new order."""
    row, col = convert.coordinates(matrix)
    old = matrix.is_entry.nonzero().flatten()
    # float64 counts exactly to 2^53, far beyond the entries of a matrix.
    arrays = convert.pack_entries(row, col, old.double(), matrix.m, matrix.k, layout)
    source = arrays["values"].long()
    entry = convert.is_entry(arrays["blk_ptr"], arrays["blk_pad"])

    def move(stored: Tensor) -> Tensor:
        taken = stored[source.to(stored.device)]
        return taken.masked_fill_(~entry.to(stored.device), 0)

    arrays["values"] = move(matrix.values.detach())
    return CSBMatrix(**arrays), move


def _apply(change: _Change, optimizer: torch.optim.Optimizer | None) -> None:
    layer, matrix = change.layer, change.matrix
    values = layer.values
    values.grad = None
    _state.replace_data(values, matrix.values)
    values.grad = change.grad
    layer._take_pattern(matrix)
    if change.state is not None:
        optimizer.state[values] = change.state
