from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable

import torch
from torch import nn

from torch_csb.nn import _dense
from torch_csb.nn._layer import CSBLayer
from torch_csb.nn._tree import Place


class Choice:
    """Which layers the caller and the model allow to be converted."""

    def __init__(
        self,
        model: nn.Module,
        found: list[Place],
        filter_fn: Callable[[str, nn.Module], bool] | None,
        exclude: str | nn.Module | Iterable[str | nn.Module],
        include: str | nn.Module | Iterable[str | nn.Module] = (),
    ) -> None:
        self._filter = filter_fn
        self._excluded = excluded_modules(model, exclude)
        self._heads = output_heads(model) - excluded_modules(model, include, "include")
        self._shared = shared_weights(model)
        self._attention = {
            id(child)
            for module in model.modules()
            if isinstance(module, nn.MultiheadAttention)
            for child in module.children()
        }

    def obstacle(self, place: Place, module: nn.Module) -> str | None:
        if isinstance(module, CSBLayer):
            return "already compressed"
        if id(module) in self._attention:
            return "part of MultiheadAttention: it reads this weight directly"
        if reason := _dense.obstacle(module):
            return reason
        if id(module) in self._excluded:
            return "excluded"
        if self._filter is not None and not self._filter(place.name, module):
            return "excluded: filter_fn returned false"
        if reason := self._shared.get(id(_dense.weight_parameter(module))):
            return reason
        if id(module) in self._heads:
            return f"output head: kept by default, include={place.name!r} converts it"
        return None


def output_heads(model: nn.Module) -> set[int]:
    """The layers that make a language model's logits, which rarely stand pruning well, and often are tied: by their
    usual name, or by what a Hugging Face model says."""
    heads = {id(module) for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"}
    for module in model.modules():
        if callable(ask := getattr(module, "get_output_embeddings", None)):
            with contextlib.suppress(NotImplementedError, AttributeError):
                heads.add(id(ask()))
    return heads


def excluded_modules(
    model: nn.Module, exclude: str | nn.Module | Iterable[str | nn.Module], argument: str = "exclude"
) -> set[int]:
    """Ids of the modules that names, patterns and modules stand for, with everything inside them."""
    items = [exclude] if isinstance(exclude, (str, nn.Module)) else list(exclude)
    named = list(model.named_modules(remove_duplicate=False))
    roots: list[nn.Module] = []
    for item in items:
        if isinstance(item, nn.Module):
            roots.append(item)
        elif isinstance(item, str):
            matches = [module for name, module in named if name and fnmatch.fnmatchcase(name, item)]
            if not matches and not set(item) & set("*?["):
                raise ValueError(f"{argument}: the model has no module {item!r}")
            roots.extend(matches)
        else:
            raise TypeError(f"{argument}: expected names, patterns or modules, got {type(item).__name__}")
    return {id(module) for root in roots for module in root.modules()}


def shared_weights(model: nn.Module) -> dict[int, str]:
    """Why the Parameters that more than one module uses can't be replaced in one of them, by id."""
    users: dict[int, list[str]] = {}
    storages: dict[tuple[torch.device, int], list[int]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{module_name}.{name}" if module_name else name
            users.setdefault(id(parameter), []).append(full)
            if type(parameter) is nn.Parameter and parameter.device.type in ("cpu", "cuda") and parameter.numel():
                key = (parameter.device, parameter.untyped_storage().data_ptr())
                storages.setdefault(key, []).append(id(parameter))
    reasons = {}
    for same in storages.values():
        distinct = list(dict.fromkeys(same))
        for i in distinct[1:]:
            reasons[i] = f"tied weight: shares memory with {users[distinct[0]][0]}"
        if len(distinct) > 1:
            reasons[distinct[0]] = f"tied weight: shares memory with {users[distinct[1]][0]}"
    for i, names in users.items():
        if len(names) > 1:
            reasons[i] = f"tied weight: used as {' and '.join(names)}"
    return reasons
