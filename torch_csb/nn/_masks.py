"""Masks as parametrizations of a weight or bias: of torch.ao.pruning, and any module that multiplies by 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_TENSORS = ("weight", "bias")


def layer_type(mod: nn.Module) -> type[nn.Module]:
    """The type without the subclass that a parametrization makes of it."""
    return parametrize.type_before_parametrizations(mod) if parametrize.is_parametrized(mod) else type(mod)


def is_parametrized(mod: nn.Module, name: str) -> bool:
    return parametrize.is_parametrized(mod, name)


def original(mod: nn.Module, name: str) -> nn.Parameter | None:
    """The trained tensor behind a parametrized one, None where there are several."""
    return mod.parametrizations[name]._parameters.get("original")


def obstacle(mod: nn.Module) -> str | None:
    """Why the parametrizations of ``mod`` are no masks, as far as it can be told without data."""
    if not parametrize.is_parametrized(mod):
        return None
    for name, steps in mod.parametrizations.items():
        if name not in _TENSORS or original(mod, name) is None:
            return f"parametrized: its {name} is computed from other tensors"
        shape = original(mod, name).shape
        for step in steps:
            # A state of another shape, as that of spectral norm, may change when it is only looked at.
            if next(step.parameters(), None) is not None or any(b.shape != shape for b in step.buffers()):
                return f"parametrized: {type(step).__name__} computes its {name} from other tensors"
    return None


def read(mod: nn.Module, name: str) -> Tensor:
    """The bool mask, True where kept, of a parametrized tensor: what its parametrizations make of ones.

    Raises:
        ValueError: they do more than to multiply by zeros and ones that don't depend on the weight.
    """
    tensor = original(mod, name).detach()
    steps = list(mod.parametrizations[name])
    kept, computed = torch.ones_like(tensor), tensor
    for step in steps:
        kept, computed = step(kept), step(computed)
    mask = kept != 0
    expected = tensor.masked_fill(~mask, 0)
    # A product with 0 leaves -0, inf and NaN behind, so equal bits are asked for inside the mask alone.
    is_mask = (
        kept.shape == computed.shape == tensor.shape
        and computed.dtype == tensor.dtype
        and bool((kept == mask.to(kept.dtype)).all())
        and bool(((computed == expected) | (computed.isnan() & (tensor.isnan() | ~mask))).all())
    )
    if not is_mask:
        names = ", ".join(type(step).__name__ for step in steps)
        raise ValueError(f"parametrized: {names} does more to its {name} than a fixed mask of zeros and ones")
    return mask


def keys_of(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """The keys of a layer's state_dict that a parametrized tensor has put there."""
    start = f"parametrizations.{name}."
    return [key for key in tensors if key.startswith(start)] if start + "original" in tensors else []


def take(rest: dict[str, Tensor], name: str, shape: tuple[int, ...], prefix: str) -> tuple[Tensor, Tensor]:
    """Takes a masked tensor's original and bool mask out of a layer's state_dict.

    Raises:
        ValueError: there is no mask, or something else than masks.
    """
    keys = keys_of(rest, name)
    own = f"parametrizations.{name}.original"
    mask = None
    for key in keys:
        if key == own:
            continue
        if not re.fullmatch(rf"parametrizations\.{name}\.\d+\.mask", key):
            raise ValueError(
                f"{prefix}{key}: expected nothing but masks beside {prefix}{own}; call "
                "torch.nn.utils.parametrize.remove_parametrizations before saving"
            )
        if tuple(rest[key].shape) != tuple(shape):
            raise ValueError(f"{prefix}{key}: expected shape {tuple(shape)}, got {tuple(rest[key].shape)}")
        kept = rest[key] != 0
        if not bool((rest[key] == kept.to(rest[key].dtype)).all()):
            raise ValueError(f"{prefix}{key}: expected zeros and ones, got other values")
        mask = kept if mask is None else mask & kept
    if mask is None:
        raise ValueError(
            f"{prefix}{own}: came without {prefix}parametrizations.{name}.0.mask. torch.ao.pruning keeps its masks in "
            "the sparsifier: call squash_mask() before saving, or add the mask to the state_dict under that name"
        )
    tensor = rest[own]
    for key in keys:
        del rest[key]
    return tensor, mask


def product(tensors: Mapping[str, Tensor], key: str) -> tuple[Tensor, list[str]] | None:
    """What a masked layer computes with as ``key`` (``"fc.weight"``), of a model's state_dict that holds original and
    mask instead, and the keys of these; None where it doesn't.

    Raises:
        ValueError: a mask of another shape, or something else than masks.
    """
    parent, dot, name = key.rpartition(".")
    prefix = parent + dot
    orig, mask = (f"{key}_{part}" for part in ("orig", "mask"))
    if isinstance(tensors.get(orig), Tensor) and isinstance(tensors.get(mask), Tensor):
        if tensors[orig].shape != tensors[mask].shape:
            shapes = tuple(tensors[orig].shape), tuple(tensors[mask].shape)
            raise ValueError(f"{mask}: expected shape {shapes[0]}, got {shapes[1]}")
        return tensors[orig] * tensors[mask].to(tensors[orig].dtype), [orig, mask]
    start = f"{prefix}parametrizations.{name}."
    if not isinstance(tensors.get(start + "original"), Tensor):
        return None
    used = [key for key in tensors if key.startswith(start)]
    shape = tuple(tensors[start + "original"].shape)
    tensor, kept = take({key[len(prefix) :]: tensors[key] for key in used}, name, shape, prefix)
    return tensor.masked_fill(~kept, 0), used
