"""A CSBLinear of which each rank holds some rows or some columns."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from torch_csb import ops
from torch_csb.distributed import _parts
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import CSBLinear, _state
from torch_csb.nn._shard import is_sharded

_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu}


class TensorParallelCSBLinear(CSBLinear):
    """What :class:`CSBColwiseParallel` and :class:`CSBRowwiseParallel` make of a CSBLinear, in place.

    ``in_features`` and ``out_features`` are the whole layer's; ``m``, ``k``, ``nnz``, ``matrix`` and the index buffers
    are this rank's part, with codes. ``values`` is a DTensor over all ranks, so that optimizers, ``clip_grad_norm_``,
    ``fully_shard`` and ``torch.distributed.checkpoint`` treat it like any tensor-parallel weight. Ranks hold unequal
    numbers of entries and DTensor wants equal ones, so each rank's part ends in zeros that no kernel reads and that no
    gradient reaches. ``bias`` is a DTensor too: sharded like the rows, or replicated and added once.

    ``state_dict`` holds DTensors, for the same layer on as many ranks. :meth:`gather` and
    :func:`torch_csb.distributed.full_state_dict` give the whole layer back.
    """

    # Set by shard_(): whether rows (0) or columns (1) are cut, the ranks, the entries for which each of them has room.
    _dim: int
    _mesh: DeviceMesh
    _capacity: int
    _input_layouts: tuple[Placement, ...]
    _output_layouts: tuple[Placement, ...]
    _use_local_output: bool

    def forward(self, x: Tensor | DTensor) -> Tensor | DTensor:
        return self._colwise(x) if self._dim == 0 else self._rowwise(x)

    def _colwise(self, x: Tensor | DTensor) -> Tensor | DTensor:
        # Each rank's gradient of x comes from its own rows alone; all of them add up.
        x = self._distributed(x).redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))
        bias = None if self.bias is None else self.bias.to_local()
        y = self._product(x, bias, self.activation)
        last = y.dim() - 1
        if self._use_local_output and self._output_layouts[0] in (Shard(-1), Shard(last)):
            return y
        shape = torch.Size((*y.shape[:-1], self.out_features))
        return self._output(DTensor.from_local(y, self._mesh, (Shard(last),), shape=shape, stride=_contiguous(shape)))

    def _rowwise(self, x: Tensor | DTensor) -> Tensor | DTensor:
        last = x.dim() - 1
        if isinstance(x, DTensor) or self._input_layouts[0] not in (Shard(-1), Shard(last)):
            x = self._distributed(x).redistribute(placements=(Shard(last),)).to_local()
        y = DTensor.from_local(self._product(x, None, None), self._mesh, (Partial(),))
        y = y.redistribute(placements=self._output_layouts)
        if self.bias is not None:
            # A redistribution to what it is, for its backward: the gradient comes back replicated, whatever y's layout.
            y = y + self.bias.redistribute(placements=(Replicate(),)).to(y.dtype)
        return self._output(y, self.activation)

    def _distributed(self, x: Tensor | DTensor) -> DTensor:
        if isinstance(x, DTensor):
            return x
        layout = self._input_layouts[0]
        if layout not in (Shard(-1), Shard(x.dim() - 1)):
            return DTensor.from_local(x, self._mesh, self._input_layouts)
        shape = torch.Size((*x.shape[:-1], self.in_features))
        return DTensor.from_local(x, self._mesh, self._input_layouts, shape=shape, stride=_contiguous(shape))

    def _output(self, y: DTensor, activation: str | None = None) -> Tensor | DTensor:
        y = y.redistribute(placements=self._output_layouts)
        if activation is None and not self._use_local_output:
            return y
        local = y.to_local()
        if activation is not None:  # On plain tensors: DTensor does not know every derivative.
            local = _ACTIVATIONS[activation](local)
        if self._use_local_output:
            return local
        return DTensor.from_local(local, self._mesh, y.placements, shape=y.shape, stride=y.stride())

    def _product(self, x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        return ops.linear(x, self.matrix, bias, activation=activation)

    @property
    def matrix(self) -> CSBMatrix:
        """This rank's rows or columns."""
        values = self.values.to_local()[: self.codes.numel() // 2]
        return CSBMatrix(
            values, self.codes, self.blk_ptr, self.blk_pad, self.units, m=self.m, k=self.k, layout=self._layout
        )

    def gather(self) -> CSBLinear:
        """The whole layer as a CSBLinear with tensors of its own, on every rank. Every rank has to call it."""
        arrays = {name: stack.full_tensor() for name, stack in _parts.stacks(self).items()}
        arrays["values"] = self.values.detach().full_tensor()
        bias = None if self.bias is None else self.bias.detach().full_tensor().clone()
        layer = CSBLinear(_parts.join(self, arrays), bias, activation=self.activation)
        layer.values.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            layer.bias.requires_grad_(self.bias.requires_grad)
        return layer.train(self.training)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def extra_repr(self) -> str:
        cut = "rows" if self._dim == 0 else "columns"
        return f"{super().extra_repr()}, {cut} of rank {self._mesh.get_local_rank()} of {self._mesh.size()}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, stack in _parts.stacks(self).items():
            destination[prefix + name] = stack

    def _read_state(self, tensors: dict[str, Any], prefix: str, *, assign: bool = False) -> _state.Incoming:
        if assign:
            raise ValueError(f"{prefix}values: a tensor-parallel layer loads in place, got assign=True")
        return _parts.read(self, tensors, prefix)

    def _adopt(self, incoming: _state.Incoming, *, assign: bool = False) -> None:
        _parts.adopt(self, incoming)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@torch.no_grad()
def shard_(layer: CSBLinear, mesh: DeviceMesh, dim: int, style: ColwiseParallel | RowwiseParallel) -> None:
    """Leaves of ``layer``, the same on every rank of ``mesh``, this rank's rows (``dim`` 0) or columns (1)."""
    part = _parts.part(layer.matrix, mesh, dim, mesh.get_local_rank())
    capacity = torch.tensor([part.values.numel()], device=part.device)
    dist.all_reduce(capacity, dist.ReduceOp.MAX, group=mesh.get_group())
    capacity = int(capacity)
    values = _parts.fill_up(part.values, capacity, mesh)
    values = nn.Parameter(values, requires_grad=layer.values.requires_grad)
    bias = layer.bias
    if bias is not None:
        placement = Shard(0) if dim == 0 else Replicate()
        shared = distribute_tensor(bias.detach(), mesh, (placement,), src_data_rank=style.src_data_rank)
        bias = nn.Parameter(shared, requires_grad=bias.requires_grad)
    layer.__class__ = TensorParallelCSBLinear
    layer.values, layer.bias = values, bias
    layer._take_pattern(part)
    layer.m, layer.k = part.m, part.k
    layer._dim, layer._mesh, layer._capacity = dim, mesh, capacity
    layer._input_layouts, layer._output_layouts = style.input_layouts, style.output_layouts
    layer._use_local_output = style.use_local_output


def check_shardable(layer: CSBLinear, mesh: DeviceMesh, style: ColwiseParallel | RowwiseParallel) -> None:
    if type(layer) is not CSBLinear:
        raise NotImplementedError(f"expected a CSBLinear, got its subclass {type(layer).__name__}; call "
                                  "parallelize_module once, and before fully_shard")  # fmt: skip
    if mesh.ndim != 1:
        raise ValueError(f'device_mesh: expected one dimension, got {mesh.ndim}; take a part of it: mesh["tp"]')
    if is_sharded(layer.values) or layer.values.device.type != mesh.device_type:
        raise ValueError(f"values: expected a plain tensor on {mesh.device_type}, got {layer.values.device}")
    if any(layout.is_partial() for layout in style.output_layouts):
        raise ValueError("output_layouts: expected Replicate or Shard, got Partial; bias and activation follow the sum")
