from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_csb.nn._layer import CSBLayer
from torch_csb.optim._state import check_optimizer, moved, trained

# What the weight of a dense layer may be called, longest first.
_DENSE_NAMES = ("parametrizations.weight.original", "weight_orig", "weight")
_BIAS_NAMES = ("parametrizations.bias.original", "bias_orig")


@torch.no_grad()
def migrate_optimizer_(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Lets the optimizer of a dense model go on with the CSB layers that :func:`torch_csb.sparsify_` put into it.

    In every parameter group each dense weight gives its place to the ``values`` of the layer that replaced it, and of
    its moments (Adam's and AdamW's first and second, SGD's momentum, all tensors of the weight's shape) those of the
    entries are kept, with zeros at padding; step counts stay as they are. Groups remain the same dictionaries in the
    same order, so a learning rate scheduler, a GradScaler and closures over the optimizer stay valid. The next step of
    SGD, Adam or AdamW moves each entry as the masked dense model's step would have.

    The dense weights live as long as the optimizer holds them, so call it right after the conversion:

        torch_csb.sparsify_(model)
        torch_csb.migrate_optimizer_(optimizer, model)

    Args:
        optimizer: any that works element by element; it may train other Parameters as well.
        model: the converted model itself. A copy of it has lost what it was made from.

    Returns:
        Names of the Parameters that took a dense one's place (``"0.values"``); empty when there was none left.

    Raises:
        TypeError: ``optimizer`` is none.
        ValueError: no CSB layer; a state that is not one number for each element; an optimizer that seems to hold the
            dense weight of a layer without a known origin. Optimizer and model are unchanged then.
    """
    check_optimizer(optimizer)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSBLayer)}
    if not layers:
        raise ValueError("model: expected CSB layers, got none; call sparsify_ first")
    successors: dict[int, list[tuple[str, CSBLayer, str]]] = {}
    for name, layer in layers.items():
        for own, parameter in layer._origin.alive().items():
            successors.setdefault(id(parameter), []).append((f"{name}.{own}" if name else own, layer, own))

    held = trained(optimizer)
    known = {id(parameter) for parameter in held}
    migrated: list[tuple[str, nn.Parameter, nn.Parameter, dict[str, Any] | None]] = []
    for parameter in held:
        found = successors.get(id(parameter), [])
        if not found:
            continue
        if len(found) > 1:
            raise ValueError(f"model: {found[0][0]} and {found[1][0]} were made from one Parameter; it has one state")
        name, layer, own = found[0]
        successor = layer._parameters[own]
        if id(successor) in known:
            raise ValueError(f"optimizer: it holds both {name} and the dense Parameter that it was made from")
        if type(successor.data) is not Tensor:
            kind = type(successor.data).__name__
            raise ValueError(f"{name}: expected a plain tensor, got a {kind}; migrate before sharding")
        state = None
        if parameter in optimizer.state:
            move = _gather(layer) if own == "values" else torch.clone
            state = moved(optimizer.state[parameter], parameter.shape, move, name, optimizer)
        migrated.append((name, parameter, successor, state))
    _check_strangers(layers, held, {id(old) for _, old, _, _ in migrated}, known)

    replacement = {id(old): new for _, old, new, _ in migrated}
    for group in optimizer.param_groups:
        if "param_names" in group:
            pairs = zip(group["params"], group["param_names"], strict=True)
            group["param_names"] = [_renamed(name) if id(p) in replacement else name for p, name in pairs]
        group["params"][:] = [replacement.get(id(parameter), parameter) for parameter in group["params"]]
    for _, old, new, state in migrated:
        optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[new] = state
    return [name for name, *_ in migrated]


def _gather(layer: CSBLayer) -> Callable[[Tensor], Tensor]:
    """Dense ``[m, k]`` (or a kernel's shape) to ``[stored]``, zeros at padding."""
    row, col = layer._weight_index()
    entry = layer.matrix.is_entry

    def gather(dense: Tensor) -> Tensor:
        stored = dense.new_zeros(entry.numel())
        stored[entry.to(dense.device)] = dense.flatten(1)[row.to(dense.device), col.to(dense.device)]
        return stored

    return gather


def _check_strangers(
    layers: dict[str, CSBLayer], held: list[nn.Parameter], migrated: set[int], known: set[int]
) -> None:
    """A copied model doesn't know what it was made from; its optimizer would train dense weights that nobody reads."""
    own = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    strangers = {tuple(p.shape) for p in held if id(p) not in migrated and id(p) not in own}
    for name, layer in layers.items():
        lost = "values" not in layer._origin.known and id(layer._parameters["values"]) not in known
        if lost and layer._weight_shape() in strangers:
            raise ValueError(
                f"optimizer: it holds a Parameter of the shape {layer._weight_shape()} of {name}, and not "
                f"{name}.values, whose origin is not known: migrate before the model is copied, or make a new optimizer"
            )


def _renamed(name: str) -> str:
    for dense in _DENSE_NAMES:
        if name == dense or name.endswith("." + dense):
            return name[: -len(dense)] + "values"
    for dense in _BIAS_NAMES:
        if name == dense or name.endswith("." + dense):
            return name[: -len(dense)] + "bias"
    return name
