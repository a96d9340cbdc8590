"""CSB layers in DistributedDataParallel and in fully_shard: two processes do what one does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import WORLD
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic
from whole_numbers import BATCH, Net, adamw, assert_same_bits, batch, loss, numbers, sgd, sparse, train

import torch_csb
from torch_csb import CSBConv2d
from torch_csb.distributed import full_state_dict, prepare_

PATTERN = ("codes", "blk_ptr", "blk_pad", "layout", "units")


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
    for layer in (model.up, model.empty, model.dense, model.down):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def one_process(device, steps=1, optimizer=sgd):
    model = Net().to(device)
    train(model, optimizer(model), *batch(device), steps)
    return model


def refused(message, function, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_no_buffer_is_of_a_type_that_ddp_can_not_send():
    for layer in (sparse(40, 30, 0), CSBConv2d.from_dense(nn.Conv2d(8, 8, 1)), sparse(40, 30, 0).half()):
        assert {buffer.dtype for buffer in layer.buffers()} == {torch.uint8, torch.int32}


def ddp_step(device, prepared):
    model = Net().to(device)
    if prepared:
        prepare_(model)
    parallel = distributed(model, device)
    sent = []

    def count(_, bucket):
        sent.append(size(bucket.buffer()))
        return allreduce_hook(dist.group.WORLD, bucket)

    parallel.register_comm_hook(None, count)
    x, factor = batch(device)
    train(parallel, sgd(model), mine(x), mine(factor))
    expected = one_process(device)
    assert_same_bits(model.state_dict(), expected.state_dict())
    assert not torch.equal(model.up.values, Net().up.values.to(device))
    dense = sum(size(p) for p in expected.parameters()) + sum(
        4 * layer.m * layer.k - size(layer.values) for layer in (expected.up, expected.empty, expected.down)
    )
    return sum(sent), sum(size(p) for p in model.parameters()), dense


@pytest.mark.parametrize("prepared", [True, False])
def test_a_step_of_ddp_is_that_of_one_process_and_reduces_the_nonzeros_alone(ranks, prepared):
    for sent, stored, dense in ranks.run(ddp_step, prepared):
        print(f"all-reduced a step: {sent} bytes, parameters of the sparse model: {stored}, of the dense one: {dense}")
        assert sent == stored < dense


class WithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = sparse(40, 64, 0)
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x):
        return self.norm(self.fc(x))


def ddp_buffers(device, prepared):
    model = WithNorm().to(device)
    said = prepare_(model).pattern_bytes if prepared else None
    parallel = distributed(model, device)
    sent = []
    for step in range(3):
        with Traffic() as traffic:
            parallel(numbers(4, 40, seed=10 * step + dist.get_rank(), device=device))
        sent.append(traffic.bytes["broadcast"])
    parallel(numbers(4, 40, seed=99, device=device))  # the same data on both: what differs came before
    pattern = sum(size(model.fc.get_buffer(name)) for name in PATTERN)
    return sent, pattern, sum(size(b) for b in model.norm.buffers()), said, model.norm.running_mean.tolist()


def test_ddp_sends_patterns_before_each_forward_unless_prepared_and_norms_always(ranks):
    first, second = ranks.run(ddp_buffers, False)
    for sent, pattern, norm, _, _ in (first, second):
        print(f"buffers broadcast a forward: {sent[1:]} bytes, of these {pattern} of patterns")
        assert sent[1:] == [pattern + norm] * 2
    assert first[-1] == second[-1]
    first, second = ranks.run(ddp_buffers, True)
    for sent, pattern, norm, said, _ in (first, second):
        print(f"buffers broadcast a forward after prepare_: {sent[1:]} bytes")
        assert sent[1:] == [norm] * 2 and said == pattern
    assert first[-1] == second[-1], "BatchNorm is synchronised as ever"


def different_patterns(device):
    model = Net(seed=dist.get_rank(), empty=dist.get_rank() == 0).to(device)
    model.up.values.grad = torch.ones_like(model.up.values)
    values = model.up.values
    said = prepare_(model)
    assert model.up.values is values and (values.grad is None) == (dist.get_rank() == 1)
    assert said.layers == ("up", "empty", "down") and said.frozen == ("empty.values",)
    for name in said.layers:
        layer, expected = model.get_submodule(name), Net().get_submodule(name).to(device)
        layer.matrix.validate()
        for array in ("values", *PATTERN):
            assert torch.equal(getattr(layer, array), getattr(expected, array)), f"{name}.{array}"
    assert torch.equal(model.dense.weight, Net(seed=dist.get_rank()).dense.weight.to(device)), "no CSB layer, not ours"
    model.up.values.data.fill_(1)  # still on its own
    return model.up.values.device.type


def test_prepare_gives_every_rank_the_weights_of_rank_0(ranks):
    assert ranks.run(different_patterns) == [ranks.device] * WORLD


def prepare_refuses(device):
    rank = dist.get_rank()
    refused(
        "model: .*ranks 0 and 1 differ in 1",
        prepare_,
        nn.Sequential(*[sparse(8, 8, 0) for _ in range(1 + rank)]).to(device),
    )
    before = sparse(8, 8 + rank, 0).to(device)
    state = {key: tensor.clone() for key, tensor in before.state_dict().items()}
    refused("CSBLinear 8 x 8 of torch.float32 as on rank 0, got CSBLinear 9 x 8", prepare_, before)
    assert_same_bits(before.state_dict(), state)
    refused("up.values: expected a plain tensor, got a DTensor", prepare_, sharded(Net(), device))
    refused("0.values: .*meta", prepare_, nn.Sequential(sparse(8, 8, 0).to("meta")))
    alone = sparse(8, 8, 0).to(device)
    alone._ddp_params_and_buffers_to_ignore = ["mine"]
    prepare_(alone)
    assert set(alone._ddp_params_and_buffers_to_ignore) == {"mine", *PATTERN}


def test_prepare_refuses_on_every_rank_what_does_not_fit(ranks):
    ranks.run(prepare_refuses)


def ddp_resume(device, path):
    x, factor = (mine(tensor) for tensor in batch(device))
    model = Net().to(device)
    prepare_(model)
    parallel, optimizer = distributed(model, device), adamw(model)
    train(parallel, optimizer, x, factor, 2)
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{path}/last.pt")
        torch_csb.save(model, f"{path}/last.safetensors")
    dist.barrier()
    train(parallel, optimizer, x, factor, 2)
    for load in (
        lambda m, saved: m.load_state_dict(saved["model"]),
        lambda m, _: torch_csb.load_into(m, f"{path}/last.safetensors"),
    ):
        saved = torch.load(f"{path}/last.pt", map_location=device, weights_only=True)
        other = Net(seed=50).to(device)  # of another pattern
        load(other, saved)
        prepare_(other)
        again, optimizer = distributed(other, device), adamw(other)
        optimizer.load_state_dict(saved["optimizer"])
        train(again, optimizer, x, factor, 2)
        assert_same_bits(other.state_dict(), model.state_dict())


def test_ddp_saves_and_resumes_to_the_bit(ranks, tmp_path):
    ranks.run(ddp_resume, str(tmp_path))


def fsdp_step(device):
    model = sharded(Net(), device)
    shapes = {name: (p.numel(), p.to_local().numel(), size(p.to_local())) for name, p in model.named_parameters()}
    x, factor = batch(device)
    optimizer = sgd(model)
    with Traffic() as traffic:
        train(model, optimizer, mine(x), mine(factor))
    assert isinstance(model.up.values, DTensor) and isinstance(
        optimizer.state[model.up.values]["momentum_buffer"], DTensor
    )
    found = full_state_dict(model)
    if dist.get_rank() == 0:
        assert_same_bits(found, one_process(device).state_dict())
    else:
        assert found == {}
    return shapes, traffic.bytes["reducescatter"]


def test_a_step_of_fsdp_is_that_of_one_process_and_values_shard(ranks):
    (first, sent), (second, again) = ranks.run(fsdp_step)
    trained = [name for name in first if name != "empty.values"]
    for name, (whole, here, _) in first.items():
        rest = second[name][1]
        rows = {"dense.weight": 47}.get(name, 1)
        assert here == -(-whole // rows // WORLD) * rows and here + rest == whole, name
    assert first["up.values"][0] % 2 == 1 and first["up.values"][1] == second["up.values"][1] + 1
    assert first["empty.values"][0] == 0
    # Shards are filled up to the length of the first rank's.
    expected = sum(WORLD * first[name][2] for name in trained)
    print(f"reduce-scattered a step: {sent} bytes, the parameters have {4 * sum(first[n][0] for n in trained)}")
    assert sent == again == expected


def fsdp_mixed_precision(device):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(Net(), device, mp_policy=policy)
    x, factor = batch(device)
    output = model(mine(x))
    assert output.dtype == torch.bfloat16
    loss(output.float(), mine(factor)).backward()
    assert model.up.values.dtype == model.up.values.grad.dtype == torch.float32
    halves = []
    for part, weight in zip(x.chunk(WORLD), factor.chunk(WORLD), strict=True):
        twin = Net().to(device).bfloat16()
        loss(twin(part.bfloat16()).float(), weight).backward()
        halves.append(twin)
    for name, parameter in model.named_parameters():
        if name != "empty.values":
            first, second = (half.get_parameter(name).grad.float() for half in halves)
            assert torch.equal(parameter.grad.full_tensor(), (first + second) / 2), name


def test_fsdp_computes_in_bfloat16_and_reduces_in_float32(ranks):
    ranks.run(fsdp_mixed_precision)


def fsdp_resume(device, path):
    x, factor = (mine(tensor) for tensor in batch(device))
    model = sharded(Net(), device)
    optimizer = adamw(model)
    train(model, optimizer, x, factor, 2)
    state, moments = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=path)
    if dist.get_rank() == 0:  # Alone, without a process group's help.
        single = Net().to(device)
        state = {"model": single.state_dict()}
        dcp.load(state, checkpoint_id=path, no_dist=True)
        single.load_state_dict(state["model"])
        torch_csb.save(single, f"{path}/single.safetensors")
    expected = full_state_dict(model)
    if dist.get_rank() == 0:
        assert_same_bits(single.state_dict(), expected)
    train(model, optimizer, x, factor, 2)
    other = Net()
    other.up.values.data.zero_()
    other = sharded(other, device)
    again = adamw(other)
    state, moments = get_state_dict(other, again)
    dcp.load({"model": state, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(other, again, model_state_dict=state, optim_state_dict=moments)
    assert again.state[other.up.values]["step"] == 2
    train(other, again, x, factor, 2)
    for name, tensor in model.state_dict().items():
        found = other.state_dict()[name]
        same = (
            torch.equal(found.to_local(), tensor.to_local())
            if isinstance(tensor, DTensor)
            else torch.equal(found, tensor)
        )
        assert same, name


def test_fsdp_saves_and_resumes_to_the_bit_with_distributed_checkpoint(ranks, tmp_path):
    ranks.run(fsdp_resume, str(tmp_path))


def fsdp_whole(device, path):
    expected = one_process(device)
    model = sharded(Net(), device)
    x, factor = batch(device)
    train(model, sgd(model), mine(x), mine(factor))
    file = f"{path}/model.safetensors"
    refused(
        r"up.values: expected a whole tensor, got a DTensor of which .*full_state_dict", torch_csb.save, model, file
    )
    refused("values: expected a whole tensor", model.up.to_dense)
    refused("values: expected a whole tensor", torch_csb.densify_, model)
    state = full_state_dict(model)
    if dist.get_rank() == 0:
        torch_csb.save(state, file)
    dist.barrier()
    loaded = Net(seed=50).to(device)
    torch_csb.load_into(loaded, file)
    assert_same_bits(loaded.state_dict(), expected.state_dict())
    for load in (lambda m: torch_csb.load_into(m, file), lambda m: m.up.load_state_dict(loaded.up.state_dict())):
        other = Net()
        for parameter in other.parameters():
            parameter.data.zero_()
        other = sharded(other, device)
        load(other)
        assert torch.equal(other.up.values.full_tensor(), expected.up.values)
        assert torch.equal(other.up.bias.full_tensor(), expected.up.bias)
    torch_csb.load_into(other, file)
    assert torch.equal(other.dense.weight.full_tensor(), expected.dense.weight)
    local = {name: parameter.to_local().clone() for name, parameter in other.named_parameters()}
    denser = Net(seed=50).to(device)
    message = (
        f"up.values: expected {len(expected.up.values)} stored entries like the layer, .*got {len(denser.up.values)}"
    )
    torch_csb.save(denser, f"{path}/{dist.get_rank()}.safetensors")
    refused(message, torch_csb.load_into, other, f"{path}/{dist.get_rank()}.safetensors")
    assert_same_bits({name: parameter.to_local() for name, parameter in other.named_parameters()}, local)
    refused(message, other.load_state_dict, denser.state_dict(), error=RuntimeError)
    assert torch.equal(other.up.values.to_local(), local["up.values"])
    refused("up.values: expected a whole tensor", denser.load_state_dict, other.state_dict(), error=RuntimeError)
    assert other(numbers(BATCH, 33, seed=1, device=device)).shape == (BATCH, 21)


def torch_states(device):
    expected, model = sharded(Net(), device), Net().to("meta")
    model.empty.values.requires_grad_(False)
    model = sharded(model, device, prepared=False, move=False).to_empty(device=device)
    model.load_state_dict(expected.state_dict())
    x, _ = batch(device)
    assert torch.equal(model(x), expected(x))

    source = Net().to(device)
    source.up.values.data.fill_(3)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if dist.get_rank() == 0 else {}, options=options)
    assert torch.equal(model(x), source(x))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        assert_same_bits({key: state[key] for key in source.state_dict()}, source.state_dict())


def test_a_model_made_on_the_meta_device_takes_states_as_torch_hands_them_out(ranks):
    ranks.run(torch_states)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 24)
        self.fc = sparse(24, 24, 0)
        self.again = self.fc
        self.out = nn.Linear(24, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.again(self.fc(self.embed(x))))


def tied(device, path):
    model = Tied().to(device)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prepare_(model)
    fully_shard(model.fc)
    state = full_state_dict(fully_shard(model))
    if dist.get_rank() == 0:
        assert_same_bits(state, expected)
        assert state["out.weight"].data_ptr() == state["embed.weight"].data_ptr()
        assert state["again.values"].data_ptr() == state["fc.values"].data_ptr()
        torch_csb.save(state, f"{path}/tied.safetensors")
        torch_csb.load_into(Tied(), f"{path}/tied.safetensors")
    layer = sparse(24, 24, 0).to(device)
    assert prepare_(layer).layers == ("",)
    state = full_state_dict(fully_shard(layer))
    assert list(state) == ([] if dist.get_rank() else ["values", "bias", "codes", "blk_ptr", "blk_pad", "layout"])


def test_tied_weights_and_shared_layers_stay_one(ranks, tmp_path):
    ranks.run(tied, str(tmp_path))


def test_a_sharded_model_gives_and_takes_whole_states(ranks, tmp_path):
    ranks.run(fsdp_whole, str(tmp_path))
