"""CSBLinear in tensor-parallel plans: two processes with a part each compute what one does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import random_matrix
from ranks import WORLD
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.utils import clip_grad_norm_
from whole_numbers import FEATURES, adamw, assert_same_bits, linear, loss, numbers, sgd, sparse, train

import torch_csb
from torch_csb import CSBLinear, CSBMatrix
from torch_csb.distributed import (
    CSBColwiseParallel,
    CSBRowwiseParallel,
    TensorParallelCSBLinear,
    _parts,
    full_state_dict,
    join_matrices,
    prepare_,
    split_matrix,
)

BATCH, HIDDEN, CLASSES = 4, 46, 20
ARRAYS = ("values", "codes", "blk_ptr", "blk_pad", "units")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("block_size", [8, 16, 64])
@pytest.mark.parametrize(("m", "k", "parts"), [(50, 70, 2), (50, 70, 3), (64, 64, 4), (3, 2, 5), (0, 9, 2), (7, 0, 2)])
def test_parts_are_the_chunks_of_the_dense_matrix_and_join_to_the_bit(device, dim, block_size, m, k, parts):
    w = random_matrix(m, k, 0.7, device=device, block_size=block_size)
    if w.nnz:
        w.values[0] = 0  # an entry all the same
    found = split_matrix(w, parts, dim)
    step = -(-(m, k)[dim] // parts)
    assert len(found) == parts and sum(part.nnz for part in found) == w.nnz
    for index, part in enumerate(found):
        part.validate()
        expected = w.to_dense().narrow(dim, start := min(index * step, (m, k)[dim]), min(step, (m, k)[dim] - start))
        assert torch.equal(part.to_dense(), expected) and part.layout == w.layout
    joined = join_matrices(found, dim)
    for name in ARRAYS:
        assert torch.equal(getattr(joined, name), getattr(w, name)), name


def test_splitting_refuses():
    w = random_matrix(20, 30, 0.5)
    for arguments, message in (((w.t(), 2, 0), "transposed"), ((w, 0, 0), "parts: .*got 0"), ((w, 2, -1), "dim: .*-1")):
        with pytest.raises(ValueError, match=message):
            split_matrix(*arguments)
    for arguments, message in (
        (([], 0), "got none"),
        (([w, w.t()], 0), "transposed"),
        (([w, random_matrix(20, 31, 0.5)], 0), "expected 30 columns, got 31"),
        (([w, random_matrix(21, 30, 0.5)], 1), "expected 20 rows, got 21"),
    ):
        with pytest.raises(ValueError, match=message):
            join_matrices(*arguments)


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


def mesh_of(device):
    return init_device_mesh(device, (WORLD,))


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
    hidden = torch.relu(expected.up(x)).abs().max()
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
