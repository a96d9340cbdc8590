"""CSB layers in fully_shard: two processes do what one does."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from data_parallel import mine, one_process, refused, sharded, size
from ranks import WORLD, mesh_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from traffic import Traffic
from whole_numbers import BATCH, Net, adamw, assert_same_bits, batch, loss, numbers, sgd, sparse, train

import torch_csb
from torch_csb.distributed import full_state_dict, prepare_


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


def test_a_sharded_model_gives_and_takes_whole_states(ranks, tmp_path):
    ranks.run(fsdp_whole, str(tmp_path))


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
    mesh = mesh_of(device)
    fully_shard(model.fc, mesh=mesh)
    state = full_state_dict(fully_shard(model, mesh=mesh))
    if dist.get_rank() == 0:
        assert_same_bits(state, expected)
        assert state["out.weight"].data_ptr() == state["embed.weight"].data_ptr()
        assert state["again.values"].data_ptr() == state["fc.values"].data_ptr()
        torch_csb.save(state, f"{path}/tied.safetensors")
        torch_csb.load_into(Tied(), f"{path}/tied.safetensors")
    layer = sparse(24, 24, 0).to(device)
    assert prepare_(layer).layers == ("",)
    state = full_state_dict(fully_shard(layer, mesh=mesh))
    assert list(state) == ([] if dist.get_rank() else ["values", "bias", "codes", "blk_ptr", "blk_pad", "layout"])


def test_tied_weights_and_shared_layers_stay_one(ranks, tmp_path):
    ranks.run(tied, str(tmp_path))
