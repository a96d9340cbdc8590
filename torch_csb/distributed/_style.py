"""Styles for ``torch.distributed.tensor.parallel.parallelize_module``."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from torch_csb.distributed._linear import check_shardable, shard_
from torch_csb.distributed._prepare import broadcast_
from torch_csb.nn import CSBLinear


class CSBColwiseParallel(ColwiseParallel):
    """:class:`~torch.distributed.tensor.parallel.ColwiseParallel` that splits a CSBLinear by output features as well.

    Rank r of p keeps the rows of W, and of the bias, that ``torch.chunk(W, p, 0)[r]`` would hold, with their own plan:
    ``y_r = act(x W_rᵀ + b_r)``. Nothing is sent in the forward; in the backward the ranks' ``dy_r W_r`` are added up.
    The cuts need not meet block borders. The layer becomes a :class:`TensorParallelCSBLinear`, in place.

    Arguments, layouts and what happens to ``nn.Linear`` and ``nn.Embedding`` are the parent's, so one plan serves a
    model in which some layers are pruned.

    Raises (when applied):
        ValueError: the mesh has several dimensions, the layer is on another device than the mesh, or is no plain
            layer on every rank alike.
        NotImplementedError: another kind of module, or a subclass of CSBLinear.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, CSBLinear):
            return super()._apply(module, device_mesh)
        return _apply(self, module, device_mesh, 0)


class CSBRowwiseParallel(RowwiseParallel):
    """:class:`~torch.distributed.tensor.parallel.RowwiseParallel` that splits a CSBLinear by input features as well.

    Rank r of p keeps the columns of W that ``torch.chunk(W, p, 1)[r]`` would hold: ``y = act(Σ_r x_r W_rᵀ + b)``. The
    sum is made by one all-reduce (or reduce-scatter, by ``output_layouts``); bias and activation follow it, once. An
    input that is no DTensor is this rank's ``torch.chunk(x, p, -1)[r]``. The rest is as for
    :class:`CSBColwiseParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, CSBLinear):
            return super()._apply(module, device_mesh)
        return _apply(self, module, device_mesh, 1)


def _apply(style: ColwiseParallel | RowwiseParallel, layer: CSBLinear, mesh: DeviceMesh, dim: int) -> nn.Module:
    check_shardable(layer, mesh, style)
    if style.src_data_rank is not None:
        # What distribute_tensor does for a dense weight: one rank's data counts.
        broadcast_({"CSBLinear": layer}, mesh.get_group(), style.src_data_rank)
    shard_(layer, mesh, dim, style)
    return layer
