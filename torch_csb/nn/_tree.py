from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Place:
    """Where a module hangs: every (parent, attribute) that refers to it. It holds no reference to the module itself."""

    name: str
    slots: tuple[tuple[nn.Module, str], ...]

    def module(self) -> nn.Module:
        parent, attribute = self.slots[0]
        return parent._modules[attribute]


def places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Place]:
    """The places of the wanted modules below ``model``, each module once, in the model's order."""
    names = {id(module): name for name, module in model.named_modules() if wanted(module)}
    names.pop(id(model), None)
    slots: dict[int, list[tuple[nn.Module, str]]] = {i: [] for i in names}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if id(child) in slots:
                slots[id(child)].append((parent, attribute))
    return [Place(name, tuple(slots[i])) for i, name in names.items()]


def put(place: Place, module: nn.Module) -> None:
    """Hangs ``module`` up in place of the old one, under every name."""
    for parent, attribute in place.slots:
        parent._modules[attribute] = module
