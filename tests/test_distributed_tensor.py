"""CSBLinear in tensor-parallel plans: two processes with a part each compute what one does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from parallel_mlp import HIDDEN, MLP, data, gradient, plan, split, whole
from ranks import WORLD, mesh_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.utils import clip_grad_norm_
from whole_numbers import assert_same_bits, loss, numbers, sgd, train

from torch_csb import CSBLinear, CSBMatrix, relayout_
from torch_csb.distributed import (
    CSBColwiseParallel,
    CSBRowwiseParallel,
    TensorParallelCSBLinear,
    full_state_dict,
    prepare_,
)


def check_step(make, device, **options):
    """Output, every gradient and the weights after a step, to the bit; returns both models."""
    expected, model = make().to(device), split(make(), device, **options)
    (x, factor), (y, _) = data(device), data(device)
    x.requires_grad_(), y.requires_grad_()
    outputs = model(x), expected(y)
    assert torch.equal(*outputs)
    for output in outputs:
        loss(output, factor).backward()
    assert torch.equal(x.grad, y.grad)
    for name, parameter in expected.named_parameters():
        owner, _, tensor = name.rpartition(".")
        assert torch.equal(gradient(model.get_submodule(owner), tensor), parameter.grad), name
    for optimizer in (sgd(model), sgd(expected)):
        optimizer.step()
    found = full_state_dict(model)
    if dist.get_rank() == 0:
        assert_same_bits(found, expected.state_dict())
    return model, expected


STEPS = {
    "both_sparse": {},
    "down_dense": {"kinds": "sparse dense"},
    "up_dense": {"kinds": "dense sparse"},
    "without_bias": {"bias": False},
    "odd_hidden": {"hidden": 47},
    "less_than_ranks": {"hidden": 1},
    "without_entries": {"kinds": "empty empty"},
    "relu_in_the_layers": {"activation": "relu"},
    "relu6_in_the_layers": {"activation": "relu6"},
}


def step(device, case, styles=None):
    model, expected = check_step(lambda: MLP(**STEPS[case]), device, styles=styles)
    for layer in model.children():
        if isinstance(layer, TensorParallelCSBLinear):
            layer.matrix.validate()
            assert layer.weight.shape == (layer.out_features, layer.in_features)
    x, _ = data(device)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast(device, kind):
            assert model(x).dtype == expected(x).dtype == kind
    return repr(model), [layer.nnz for layer in model.children() if isinstance(layer, CSBLinear)]


@pytest.mark.parametrize("case", STEPS)
def test_a_plan_of_column_and_row_splits_computes_what_one_process_does(ranks, case):
    (first, entries), (second, others) = ranks.run(step, case)
    expected = MLP(**STEPS[case])
    layers = [layer for layer in expected.children() if isinstance(layer, CSBLinear)]
    assert [a + b for a, b in zip(entries, others, strict=True)] == [layer.nnz for layer in layers]
    print(f"{case}: entries on each rank {entries} and {others}")
    for text, rank in ((first, 0), (second, 1)):
        if type(expected.up) is CSBLinear:
            assert f"rows of rank {rank} of 2" in text and "in_features=33" in text


def bitmaps(device):
    """Parts have codes whatever the whole layer has; a whole layer with a bitmap loads into them."""
    expected, (x, factor) = MLP(), data(device)
    relayout_(expected, encoding="bitmap")
    model = split(copy.deepcopy(expected), device)
    expected = expected.to(device)
    for m in (model, expected):
        loss(m(x), factor).backward()
        sgd(m).step()
    assert torch.equal(model(x), expected(x))
    assert model.up.matrix.layout.encoding == model.down.matrix.layout.encoding == "codes"
    assert model.up.layout.tolist() == model.up.matrix.layout.to_tensor().tolist()
    model.up.matrix.validate()
    for name in ("up", "down"):
        gathered = model.get_submodule(name).gather()
        assert torch.equal(gathered.matrix.to_dense(), expected.get_submodule(name).matrix.to_dense())
    before = expected(x)
    model.up.values.data.zero_(), model.down.values.data.zero_()
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model(x), before)
    state = full_state_dict(model)
    if dist.get_rank() == 0:
        expected.load_state_dict(state)
        assert expected.up.matrix.layout.encoding == "codes" and torch.equal(expected(x), before)


def test_layers_with_bitmaps_are_split(ranks):
    ranks.run(bitmaps)


def whole_hidden_features(device):
    styles = {
        "up": CSBColwiseParallel(output_layouts=Replicate()),
        "down": CSBRowwiseParallel(input_layouts=Replicate()),
    }
    step(device, "odd_hidden", styles)


def test_uneven_features_may_be_whole_between_the_layers(ranks):
    ranks.run(whole_hidden_features)


def smooth_activation(device, name):
    expected = MLP(activation=name).double().to(device)
    model = split(MLP(activation=name).double(), device)
    x, factor = (0.1 * tensor.double() for tensor in data(device))
    for m in (model, expected):
        loss(m(x), factor).backward()
    # Only the sums over the 46 hidden features are made in two parts. Each errs by 46 times half the unit of double, of
    # the sum of the products' magnitudes; what follows is Lipschitz with at most 1.2, times numbers below 4.
    hidden = torch.relu(expected.up(x)).abs().max().detach()
    bound = float(46 * 2**-53 * 46 * 2 * hidden)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1.2 * bound)
    for layer in ("up", "down"):
        for tensor in ("values", "bias"):
            found, known = (gradient(m.get_submodule(layer), tensor) for m in (model, expected))
            torch.testing.assert_close(found, known, rtol=0, atol=8 * max(1.0, float(hidden)) * bound)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_an_activation_follows_the_sum_over_ranks(ranks, activation):
    ranks.run(smooth_activation, activation)


def layouts(device):
    """Sequences that are sharded outside, DTensors in and out, outputs sharded by features."""
    mesh, expected = mesh_of(device), MLP().to(device)
    rank = dist.get_rank()
    sequences, factors = data(device, 2, 6)
    known = expected(sequences)
    loss(known, factors).backward()

    def check(styles, x, expect_output, backward):
        model = split(MLP(), device, styles)
        x = x.detach().requires_grad_()
        output = model(x)
        expect_output(output)
        backward(output)
        for name, parameter in expected.named_parameters():
            owner, _, tensor = name.rpartition(".")
            assert torch.equal(gradient(model.get_submodule(owner), tensor), parameter.grad), name
            if tensor == "bias" and owner == "down":
                assert model.down.bias.grad.placements == (Replicate(),)
        return x.grad

    twin = sequences.detach().clone().requires_grad_()
    loss(expected(twin), factors).backward()  # the gradient of x; those of the weights double
    for parameter in expected.parameters():
        parameter.grad /= 2

    # Sequence parallel: dimension 1 is sharded outside the MLP.
    styles = {
        "up": CSBColwiseParallel(input_layouts=Shard(1)),
        "down": CSBRowwiseParallel(output_layouts=Shard(1)),
    }
    mine = slice(3 * rank, 3 * rank + 3)
    grad = check(
        styles,
        sequences[:, mine],
        lambda y: torch.testing.assert_close(y, known[:, mine], rtol=0, atol=0),
        lambda y: ((y * factors[:, mine]).sum() / 2).backward(),
    )
    assert torch.equal(grad, twin.grad[:, mine])

    # DTensors all the way, features sharded at the end.
    styles = {
        "up": CSBColwiseParallel(use_local_output=False),
        "down": CSBRowwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }

    def is_sharded_by_features(y):
        assert y.placements == (Shard(2),) and torch.equal(y.full_tensor(), known)

    replicated = distribute_tensor(sequences, mesh, [Replicate()])
    grad = check(styles, replicated, is_sharded_by_features, lambda y: loss(y, _like(factors, y)).backward())
    assert torch.equal(grad.full_tensor(), twin.grad)

    # Features sharded at the start, whole outputs in between.
    styles = {
        "up": CSBColwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
        "down": CSBRowwiseParallel(input_layouts=Replicate()),
    }
    part = sequences.chunk(WORLD, -1)[rank]
    grad = check(
        styles,
        part,
        lambda y: torch.testing.assert_close(y, known, rtol=0, atol=0),
        lambda y: loss(y, factors).backward(),
    )
    assert torch.equal(grad, twin.grad.chunk(WORLD, -1)[rank])


def _like(tensor, other):
    return distribute_tensor(tensor, other.device_mesh, other.placements)


def test_layouts_of_inputs_and_outputs_are_those_of_the_plan(ranks):
    ranks.run(layouts)


def source_rank(device):
    rank = dist.get_rank()
    model = split(MLP(seed=10 * rank), device)
    found = full_state_dict(model)
    if rank == 0:
        assert_same_bits(found, MLP().state_dict())
    layer = parallelize_module(MLP().up.to(device), mesh_of(device), CSBRowwiseParallel())
    found = full_state_dict(layer)
    if rank == 0:
        assert_same_bits(found, MLP().up.state_dict())
    alone = split(MLP(), device, src_data_rank=None)
    assert alone.up.gather().nnz == MLP().up.nnz
    before = MLP(hidden=HIDDEN + rank).to(device)
    with pytest.raises(
        ValueError, match="CSBLinear: expected CSBLinear 46 x 33 .* as on rank 0, got .*47 x 33 .*rank 1"
    ):
        split(before, device)
    assert_same_bits(before.state_dict(), MLP(hidden=HIDDEN + rank).state_dict())
    assert type(before.up) is CSBLinear


def test_the_weights_of_one_rank_are_split_as_parallelize_module_promises(ranks):
    ranks.run(source_rank)


def clipping(device):
    model, expected = split(MLP("sparse dense"), device), MLP("sparse dense").to(device)
    x, factor = data(device)
    for m in (model, expected):
        loss(m(x), factor).backward()
    found, known = (clip_grad_norm_(m.parameters(), 1.0) for m in (model, expected))
    # A sum of squares in another order: relative error of the length times half the unit of float32.
    length = sum(p.numel() for p in expected.parameters())
    torch.testing.assert_close(whole(found), known, rtol=length * 2**-24, atol=0)
    torch.testing.assert_close(gradient(model.up, "values"), expected.up.values.grad, rtol=length * 2**-23, atol=0)


def test_the_norm_of_gradients_is_that_of_one_process(ranks):
    ranks.run(clipping)


def both_ways(device):
    """fully_shard over one dimension of a mesh, parts over the other."""
    mesh = init_device_mesh(device, (1, WORLD), mesh_dim_names=("data", "parts"))
    model, expected = MLP().to(device), MLP().to(device)
    parallelize_module(model, mesh["parts"], plan())
    with pytest.raises(ValueError, match="prepare_ before sharding"):
        prepare_(model)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    x, factor = data(device)
    for m in (model, expected):
        train(m, sgd(m), x, factor)
    found = full_state_dict(model)
    if dist.get_rank() == 0:
        assert_same_bits(found, expected.state_dict())
    model.load_state_dict(model.state_dict())
    assert torch.equal(model(x), expected(x))


def test_fsdp_goes_around_parts(ranks):
    ranks.run(both_ways)


def refusals(device):
    mesh = mesh_of(device)

    class Own(CSBLinear):
        pass

    w = CSBMatrix.from_dense(numbers(8, 8, seed=0, device=device))
    with pytest.raises(NotImplementedError, match="its subclass Own"):
        parallelize_module(Own(w), mesh, CSBColwiseParallel())
    model = split(MLP(), device)
    with pytest.raises(NotImplementedError, match="once, and before fully_shard"):
        parallelize_module(model, mesh, plan())
    with pytest.raises(NotImplementedError):
        parallelize_module(nn.Conv2d(8, 8, 1).to(device), mesh, CSBRowwiseParallel())
    partial = CSBRowwiseParallel(output_layouts=Partial())
    with pytest.raises(ValueError, match="output_layouts: expected Replicate or Shard, got Partial"):
        parallelize_module(CSBLinear(w), mesh, partial)
    layer = CSBLinear(w).to("meta")
    with pytest.raises(ValueError, match="values: expected a plain tensor on .*, got meta"):
        parallelize_module(layer, mesh, CSBColwiseParallel())
    grid = init_device_mesh(device, (1, WORLD), mesh_dim_names=("data", "parts"))
    with pytest.raises(ValueError, match="device_mesh: expected one dimension, got 2"):
        CSBColwiseParallel()._apply(CSBLinear(w), grid)
    with pytest.raises(RuntimeError, match="x: expected 23 features"):
        model.down(numbers(2, HIDDEN, seed=0, device=device))


def test_what_can_not_be_split_is_refused(ranks):
    ranks.run(refusals)
