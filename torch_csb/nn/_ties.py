"""Tensors that a model has under several names."""

from __future__ import annotations

from typing import Any

from torch import nn

Slots = list[tuple[dict[str, Any], str]]


def ties(model: nn.Module) -> dict[str, list[str]]:
    """The other names of each Parameter or buffer that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}


def meta_ties(model: nn.Module) -> list[Slots]:
    """Where each Parameter on the meta device that modules share hangs; assigning data would untie it."""
    slots: dict[int, Slots] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                slots.setdefault(id(parameter), []).append((module._parameters, name))
    return [same for same in slots.values() if len(same) > 1]


def tie(tied: list[Slots]) -> None:
    """Hangs up in all slots of a tie what was assigned to one of them."""
    for slots in tied:
        filled = [parameters[name] for parameters, name in slots if not parameters[name].is_meta]
        if filled:
            for parameters, name in slots:
                parameters[name] = filled[0]
