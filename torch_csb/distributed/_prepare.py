"""What has to be equal on all ranks before a model is wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_csb import convert
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _state
from torch_csb.nn._layer import CSBLayer
from torch_csb.nn._shard import is_sharded

_PATTERN = ("codes", "blk_ptr", "blk_pad", "layout", "units")


@dataclass(frozen=True)
class Preparation:
    """What :func:`prepare_` did.

    Attributes:
        layers: names of the CSB layers.
        pattern_bytes: bytes of their patterns: what DDP would otherwise send from rank 0 before each forward.
        frozen: names of ``values`` without an entry, which need no gradient any more.
    """

    layers: tuple[str, ...]
    pattern_bytes: int
    frozen: tuple[str, ...]


def prepare_(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> Preparation:
    """Makes the CSB layers of ``model`` ready for DistributedDataParallel or ``fully_shard``; every rank calls it.

    1. Every layer takes the pattern and the values of rank 0, so that ranks which pruned on their own agree.
    2. The patterns never change while training, so DDP is told to leave them alone. Otherwise it would send them from
       rank 0 before each forward. Other buffers, of BatchNorm for instance, are synchronised as ever.
    3. ``values`` without an entry get ``requires_grad=False``: ``fully_shard`` can't reduce an empty gradient.

    Call it on the very module that is wrapped, since DDP looks there. Where a pattern changed, make the optimizer anew.

    Raises:
        ValueError: the layers differ between ranks in name, shape or dtype, on every rank alike; or they are sharded
            already, or on the meta device.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSBLayer)}
    for name, layer in layers.items():
        key = _key(name, "values")
        if is_sharded(layer.values):
            raise ValueError(f"{key}: expected a plain tensor, got a DTensor; call prepare_ before sharding")
        if layer.values.is_meta:
            raise ValueError(f"{key}: expected data, got a tensor on the meta device")
    broadcast_(layers, process_group, src=0)
    _let_ddp_ignore(model, [_key(name, buffer) for name in layers for buffer in _PATTERN])
    frozen = []
    for name, layer in layers.items():
        if layer.values.numel() == 0 and layer.values.requires_grad:
            layer.values.requires_grad_(False)
            frozen.append(_key(name, "values"))
    size = sum(_bytes(layer.get_buffer(buffer)) for layer in layers.values() for buffer in _PATTERN)
    return Preparation(tuple(layers), size, tuple(frozen))


def _key(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _let_ddp_ignore(model: nn.Module, names: list[str]) -> None:
    known = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(known.union(names)))


@torch.no_grad()
def broadcast_(layers: Mapping[str, CSBLayer], group: dist.ProcessGroup | None, src: int) -> None:
    """Gives every rank of ``group`` the pattern and the values that rank ``src`` of the group has.

    Raises:
        ValueError: on every rank, when the ranks' layers don't fit each other.
    """
    mine = {name: _describe(layer) for name, layer in layers.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    theirs = everyone[src]
    for rank, other in enumerate(everyone):
        if list(other) != list(theirs):
            different = ", ".join(sorted(set(other) ^ set(theirs))) or "their order"
            raise ValueError(f"model: expected the same CSB layers on every rank, ranks {src} and {rank} differ in "
                             f"{different}")  # fmt: skip
        for name, (kind, *_) in other.items():
            if kind != theirs[name][0]:
                raise ValueError(f"{name}: expected {theirs[name][0]} as on rank {src}, got {kind} on rank {rank}")
    for name, layer in layers.items():
        _, layout, stored = theirs[name]
        blocks = -(-layer.m // layout.block_size) * -(-layer.k // layout.block_size)
        codes = layout.codes_length(stored, blocks)
        sizes = {"values": stored, "codes": codes, "blk_ptr": blocks + 1, "blk_pad": blocks}
        arrays = {}
        for array, size in sizes.items():
            current = getattr(layer, array).detach()
            dtype = layout.codes_dtype if array == "codes" else current.dtype
            arrays[array] = current if dist.get_rank(group) == src else current.new_empty(size, dtype=dtype)
            dist.broadcast(arrays[array], group=group, group_src=src)
        if dist.get_rank(group) != src:
            units = convert.plan(arrays["blk_ptr"], arrays["blk_pad"], layer.m, layer.k, layout.block_size)
            matrix = CSBMatrix(**arrays, units=units, m=layer.m, k=layer.k, layout=layout)
            _state.adopt_matrix(layer, matrix, assign=False)


def _describe(layer: CSBLayer) -> tuple[str, Any, int]:
    kind = f"{type(layer).__name__} {layer.m} x {layer.k} of {layer.values.dtype}"
    return kind, layer._layout, layer.values.numel()
