"""CSB layers in DistributedDataParallel: two processes do what one does, and send no more than they have to."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from data_parallel import distributed, mine, one_process, refused, sharded, size
from ranks import WORLD
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from traffic import Traffic
from whole_numbers import Net, adamw, assert_same_bits, batch, numbers, sgd, sparse, train

import torch_csb
from torch_csb import CSBConv2d, relayout_
from torch_csb.distributed import prepare_

PATTERN = ("codes", "blk_ptr", "blk_pad", "layout", "units")


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


def different_encodings(device):
    """Rank 0 has bitmaps, rank 1 codes."""
    model, expected = Net().to(device), Net().to(device)
    relayout_(expected, encoding="bitmap")
    if dist.get_rank() == 0:
        relayout_(model, encoding="bitmap")
    for name in prepare_(model).layers:
        layer = model.get_submodule(name)
        layer.matrix.validate()
        for array in ("values", *PATTERN):
            assert torch.equal(getattr(layer, array), getattr(expected.get_submodule(name), array)), f"{name}.{array}"
    x, factor = batch(device)
    train(distributed(model, device), sgd(model), mine(x), mine(factor))
    train(expected, sgd(expected), x, factor)
    assert_same_bits(model.state_dict(), expected.state_dict())


def test_every_rank_takes_the_encoding_of_rank_0(ranks):
    ranks.run(different_encodings)


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
