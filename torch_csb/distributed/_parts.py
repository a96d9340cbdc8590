"""The state of a tensor-parallel layer: the ranks' arrays as DTensors, one stacked on the other, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from torch_csb import convert
from torch_csb.distributed._split import chunk_bounds, join_matrices, part_of
from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _state
from torch_csb.nn._shard import distributed_like, is_sharded

_INDICES = ("codes", "blk_ptr", "blk_pad")


def part(w: CSBMatrix, mesh: DeviceMesh, dim: int, rank: int) -> CSBMatrix:
    """A rank's part, with codes whatever W has: stacks have room for those."""
    return part_of(w, mesh.size(), dim, rank, Layout.of_block_size(w.block_size))


def _shapes(layer: Any) -> list[tuple[int, int]]:
    """(m, k) of every rank's part."""
    bounds = chunk_bounds(layer._weight_shape()[layer._dim], layer._mesh.size())
    return [(high - low, layer.k) if layer._dim == 0 else (layer.m, high - low) for low, high in bounds]


def _blocks(m: int, k: int, block_size: int) -> int:
    return -(-m // block_size) * -(-k // block_size)


def _room(layer: Any) -> dict[str, int]:
    """Elements that each rank has in a stack; by torch.chunk's rule the first part has the most blocks."""
    blocks = _blocks(*_shapes(layer)[0], layer.block_size)
    return {"codes": 2 * layer._capacity, "blk_ptr": blocks + 1, "blk_pad": blocks}


def stacks(layer: Any) -> dict[str, DTensor]:
    """The index arrays of all ranks, each rank's filled up with zeros; nothing is sent."""
    found = {}
    for name, size in _room(layer).items():
        array = layer.get_buffer(name)
        local = array.new_zeros(size)
        local[: array.numel()] = array
        found[name] = DTensor.from_local(local, layer._mesh, (Shard(0),))
    return found


def join(layer: Any, arrays: dict[str, Tensor]) -> CSBMatrix:
    """The whole matrix from the whole stacks."""
    world = layer._mesh.size()
    parts = []
    for rank, (m, k) in enumerate(_shapes(layer)):
        # Copies, since a view of an empty row may begin at an address that no 16-bit code may have.
        local = {name: array.view(world, array.numel() // world)[rank].clone() for name, array in arrays.items()}
        parts.append(_part(local, m, k, layer._layout))
    return join_matrices(parts, layer._dim)


def _part(local: dict[str, Tensor], m: int, k: int, layout: Any) -> CSBMatrix:
    cut = _cut(local, m, k, layout.block_size)
    units = convert.plan(cut["blk_ptr"], cut["blk_pad"], m, k, layout.block_size)
    return CSBMatrix(**cut, units=units, m=m, k=k, layout=layout)


def _cut(local: dict[str, Tensor], m: int, k: int, block_size: int) -> dict[str, Tensor]:
    """A rank's arrays without the zeros that fill up its part of a stack."""
    blocks = _blocks(m, k, block_size)
    blk_ptr = local["blk_ptr"][: blocks + 1]
    stored = max(int(blk_ptr[-1]), 0)
    sizes = {"values": stored, "codes": 2 * stored, "blk_ptr": blocks + 1, "blk_pad": blocks}
    return {name: array[: sizes[name]] for name, array in local.items()}


@dataclass
class Incoming(_state.Incoming):
    """``matrix`` is the pattern of this rank's part, ``values`` are those of all ranks."""

    values: DTensor | None = None


def read(layer: Any, tensors: dict[str, Any], prefix: str) -> Incoming:
    """Checks the state of this layer on as many ranks, or of a whole layer, sparse or dense; changes nothing.

    Raises:
        ValueError: naming the tensor and what is wrong with it.
    """
    if any(is_sharded(tensors.get(name)) for name in ("values", *_INDICES)):
        return _read_stacks(layer, tensors, prefix)
    found = _state.read(tensors, _whole(layer), prefix)
    values = None
    if found.matrix is not None:
        parts = [part(found.matrix, layer._mesh, layer._dim, rank) for rank in range(layer._mesh.size())]
        capacity = max(part.values.numel() for part in parts)
        if capacity != layer._capacity or layer.values.device_mesh != layer._mesh:
            raise ValueError(
                f"{prefix}values: expected parts of at most {layer._capacity} stored entries, as the tensor-parallel "
                f"layer has, got {capacity}; load a whole weight before parallelize_module"
                if capacity != layer._capacity
                else f"{prefix}values: the layer is sharded once more; load a whole weight before fully_shard"
            )
        found.matrix = parts[layer._mesh.get_local_rank()]
        values = fill_up(found.matrix.values, capacity, layer._mesh)
    return Incoming(found.matrix, found.bias, found.missing, found.unexpected, values)


def _whole(layer: Any) -> _state.Expected:
    m, k = layer._weight_shape()
    return replace(_state.Expected.of(layer), m=m, k=k)


def fill_up(values: Tensor, capacity: int, mesh: DeviceMesh) -> DTensor:
    """The values of all ranks' parts, each filled up with zeros to ``capacity``."""
    local = values.new_zeros(capacity)
    local[: values.numel()] = values
    return DTensor.from_local(local, mesh, (Shard(0),))


def _read_stacks(layer: Any, tensors: dict[str, Any], prefix: str) -> Incoming:
    tensors, values = dict(tensors), tensors.get("values")
    bias = {name: tensors.pop(name) for name in ("bias",) if name in tensors}
    shapes = {"values": tuple(layer.values.shape)}
    shapes |= {name: (layer._mesh.size() * size,) for name, size in _room(layer).items()}
    for name in filter(tensors.__contains__, shapes):
        tensor, mesh = tensors[name], layer.values.device_mesh if name == "values" else layer._mesh
        if not is_sharded(tensor) or tuple(tensor.shape) != shapes[name] or tensor.device_mesh != mesh:
            raise ValueError(
                f"{prefix}{name}: expected a DTensor of shape {shapes[name]} on {mesh}, got a {type(tensor).__name__} "
                f"of shape {tuple(tensor.shape)}; this is not the state of a layer in {layer._mesh.size()} such parts"
            )
    if shapes.keys() <= tensors.keys():
        local = _cut({name: tensors[name].to_local() for name in _INDICES}, layer.m, layer.k, layer.block_size)
        # Of values only dtype and length are checked, and fully_shard may have cut them once more.
        stored = local["codes"].numel() // 2
        tensors |= local | {"values": torch.empty(stored, dtype=values.dtype, device=local["codes"].device)}
    found = _state.read(tensors, replace(_state.Expected.of(layer), has_bias=False), prefix)
    incoming = Incoming(found.matrix, None, found.missing, found.unexpected, values)
    rest = _state.read(bias, _whole(layer), prefix)
    incoming.bias = rest.bias
    incoming.missing.extend(name for name in rest.missing if name == "bias")
    incoming.unexpected.extend(rest.unexpected)
    return incoming


@torch.no_grad()
def adopt(layer: Any, incoming: Incoming) -> None:
    matrix = incoming.matrix
    if matrix is not None:
        # Whether a pattern changed is known on its own rank alone, and gradients have to be there on all or on none.
        layer.values.grad = None
        layer.values.copy_(incoming.values)
        arrays = {name: getattr(matrix, name) for name in (*_INDICES, "units")}
        arrays["layout"] = matrix.layout.to_tensor()
        for name, array in arrays.items():
            layer._buffers[name] = array.to(layer._buffers[name].device, copy=True)
        layer._layout, layer.block_size = matrix.layout, matrix.block_size
    if incoming.bias is not None:
        layer.bias.copy_(distributed_like(incoming.bias, layer.bias))
