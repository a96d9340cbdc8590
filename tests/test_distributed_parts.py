"""States of tensor-parallel layers: saved, resumed, put together, refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_mlp import HIDDEN, MLP, data, split, whole
from ranks import WORLD, mesh_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from whole_numbers import FEATURES, adamw, assert_same_bits, linear, sgd, sparse, train

import torch_csb
from torch_csb import CSBLinear
from torch_csb.distributed import (
    CSBColwiseParallel,
    full_state_dict,
)


def resume(device, path):
    x, factor = data(device)
    model = split(MLP(), device)
    optimizer = adamw(model)
    train(model, optimizer, x, factor, 2)
    state, moments = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=path)
    whole_state = full_state_dict(model)
    if dist.get_rank() == 0:
        torch_csb.save(whole_state, f"{path}/whole.safetensors")
    dist.barrier()
    train(model, optimizer, x, factor, 2)
    expected = full_state_dict(model)

    other = MLP()
    for parameter in other.parameters():
        parameter.data.zero_()
    other = split(other, device)
    again = adamw(other)
    state, moments = get_state_dict(other, again)
    dcp.load({"model": state, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(other, again, model_state_dict=state, optim_state_dict=moments)
    train(other, again, x, factor, 2)
    assert_same_bits(full_state_dict(other), expected)

    # The file of the whole model, into one process and into parts.
    single, parts = MLP(seed=50).to(device), split(MLP(), device)
    torch_csb.load_into(single, f"{path}/whole.safetensors")
    parts.up.values.grad = torch.zeros_like(parts.up.values)
    torch_csb.load_into(parts, f"{path}/whole.safetensors")
    assert parts.up.values.grad is None
    found = full_state_dict(parts)
    if dist.get_rank() == 0:
        assert_same_bits(found, single.state_dict())
        assert_same_bits(found, whole_state)


def test_parts_are_saved_and_resumed_and_put_together(ranks, tmp_path):
    ranks.run(resume, str(tmp_path))


def states(device):
    model, other = split(MLP(), device), split(MLP(seed=3), device)
    state = model.state_dict()
    assert set(state) == set(MLP().state_dict())
    assert all(isinstance(tensor, DTensor) for key, tensor in state.items() if not key.endswith("layout"))
    local = {key: whole(tensor).clone() for key, tensor in state.items()}

    def refuse(message, layer, **options):
        with pytest.raises(RuntimeError, match=message):
            model.up.load_state_dict(layer, **options)
        assert_same_bits({key: whole(tensor) for key, tensor in model.state_dict().items()}, local)

    denser = sparse(FEATURES, HIDDEN, 0, sparsity=0.3).to(device).state_dict()
    refuse("values: expected parts of at most .* load a whole weight before parallelize_module", denser)
    refuse("assign=True", model.up.state_dict(), assign=True)
    refuse("values: expected a DTensor of shape .*not the state of a layer in 2 such parts", other.down.state_dict())
    broken = dict(model.up.state_dict())
    broken["codes"] = distribute_tensor(
        torch.full((len(broken["codes"]),), 255, dtype=torch.uint8), mesh_of(device), [Shard(0)]
    )
    refuse("codes: ", broken)
    refuse("codes: expected a DTensor", broken | {"codes": broken["codes"].full_tensor()})
    refuse("values: came without codes", {key: tensor for key, tensor in broken.items() if key != "codes"})
    refuse("bias: expected shape", dict(model.up.state_dict()) | {"bias": torch.zeros(3)})
    refuse("Missing key.*bias", {key: tensor for key, tensor in model.up.state_dict().items() if key != "bias"})
    model.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()})
    assert_same_bits({key: whole(tensor) for key, tensor in model.state_dict().items()}, local)
    with pytest.raises(ValueError, match="values: expected a whole tensor"):
        torch_csb.densify_(model)
    with pytest.raises(RuntimeError, match="up.values: expected a whole tensor, got a DTensor"):
        MLP().to(device).load_state_dict(model.state_dict())
    gathered = model.up.gather()
    assert type(gathered) is CSBLinear and not isinstance(gathered.values, DTensor)
    assert_same_bits(gathered.state_dict(), MLP().up.to(device).state_dict())


def test_the_state_of_parts_is_checked_and_refused_whole(ranks):
    ranks.run(states)


def mirrored(layer):
    """Another pattern and other values, with as many entries in each row."""
    ones = layer.matrix.with_values(torch.ones_like(layer.values))
    twin = CSBLinear.from_dense(linear(layer.k, layer.m, 77), ones.to_dense().flip(1) != 0, block_size=8)
    assert not torch.equal(twin.codes, layer.codes) and len(twin.values) == len(layer.values)
    return twin


def other_pattern(device):
    def part(layer):
        return parallelize_module(layer.to(device), mesh_of(device), CSBColwiseParallel())

    def layer():
        return sparse(FEATURES, HIDDEN, 0, block_size=8)

    expected = mirrored(layer()).to(device)
    for state in (expected.state_dict(), part(mirrored(layer())).state_dict()):
        model = part(layer())
        model.load_state_dict(state)
        model.matrix.validate()
        assert_same_bits(model.gather().state_dict(), expected.state_dict())
        x, _ = data(device)
        assert torch.equal(model(x), expected(x).chunk(WORLD, -1)[dist.get_rank()])
    model.values.requires_grad_(False)
    assert [p.requires_grad for p in model.gather().parameters()] == [False, True]
    assert not model.eval().gather().training

    # One layer under two names.
    pair = nn.ModuleDict({"first": model, "second": model})
    state = full_state_dict(pair)
    if dist.get_rank() == 0:
        assert state["first.values"].data_ptr() == state["second.values"].data_ptr()


def test_parts_take_another_pattern_that_has_room(ranks):
    ranks.run(other_pattern)


def copies(device):
    model = split(MLP(), device)
    twin = copy.deepcopy(model)
    train(model, sgd(model), *data(device))
    expected = split(MLP(), device)
    assert_same_bits(full_state_dict(twin), full_state_dict(expected))
    train(twin, sgd(twin), *data(device))
    assert_same_bits(full_state_dict(twin), full_state_dict(model))


def test_a_copy_of_parts_is_equal_and_independent(ranks):
    ranks.run(copies)
