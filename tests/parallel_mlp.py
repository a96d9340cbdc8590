"""A sparse, partly dense or empty MLP in whole numbers, split over two processes by a tensor-parallel plan."""

from __future__ import annotations

import torch
from ranks import mesh_of
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from whole_numbers import FEATURES, linear, numbers, sparse

from torch_csb.distributed import (
    CSBColwiseParallel,
    CSBRowwiseParallel,
    TensorParallelCSBLinear,
    _parts,
)

BATCH, HIDDEN, CLASSES = 4, 46, 20


def empty(*arguments, **options):
    return sparse(*arguments, sparsity=1.1, **options)


KINDS = {"sparse": sparse, "empty": empty, "dense": linear}


class MLP(nn.Module):
    def __init__(self, kinds="sparse sparse", *, hidden=HIDDEN, bias=True, activation=None, seed=0):
        super().__init__()
        up, down = (KINDS[kind] for kind in kinds.split())
        options = {"activation": activation} if activation else {}
        self.up = up(FEATURES, hidden, seed, bias=bias, **options)
        self.down = down(hidden, CLASSES, seed + 1, bias=bias, **options)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def plan(**options):
    return {"up": CSBColwiseParallel(), "down": CSBRowwiseParallel(**options)}


def split(model, device, styles=None, **options):
    return parallelize_module(model.to(device), mesh_of(device), styles or plan(), **options)


def data(device, *shape):
    shape = shape or (BATCH,)
    return numbers(*shape, FEATURES, seed=7, device=device), numbers(*shape, CLASSES, seed=8, device=device)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient(layer, name):
    """Of the whole layer, in its entries' order."""
    parameter = layer.get_parameter(name)
    if name != "values" or not isinstance(layer, TensorParallelCSBLinear):
        return whole(parameter.grad)
    arrays = {name: stack.full_tensor() for name, stack in _parts.stacks(layer).items()}
    return _parts.join(layer, arrays | {"values": whole(parameter.grad)}).values
