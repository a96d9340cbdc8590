"""Half of a batch on each of two processes."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from ranks import WORLD, mesh_of
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from whole_numbers import Net, batch, sgd, train

from torch_csb.distributed import prepare_


def size(tensor):
    return tensor.numel() * tensor.element_size()


def mine(tensor):
    """This rank's part of a batch."""
    return tensor.chunk(WORLD)[dist.get_rank()]


def distributed(model, device, **options):
    return DistributedDataParallel(
        model.to(device), device_ids=[dist.get_rank()] if device == "cuda" else None, **options
    )


def sharded(model, device, prepared=True, move=True, **options):
    if move:
        model = model.to(device)
    if prepared:
        prepare_(model)
    # Without a mesh fully_shard would take GPUs wherever there are some.
    mesh = mesh_of(device)
    for layer in (model.up, model.empty, model.dense, model.down):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def one_process(device, steps=1, optimizer=sgd):
    model = Net().to(device)
    train(model, optimizer(model), *batch(device), steps)
    return model


def refused(message, function, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=message):
        function(*arguments, **options)
