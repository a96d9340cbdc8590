"""Mixed precision: autocast casts what F.linear casts, float32 parameters get float32 gradients, GradScaler works."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import random_matrix
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from transform_cases import pruned

from torch_csb import CSBConv2d, CSBLinear, ops
from torch_csb.testing import compare, expect_spmm

HALVES = (torch.bfloat16, torch.float16)


def layer(device: str, dtype: torch.dtype = torch.float32, **options) -> CSBLinear:
    return CSBLinear.from_dense(pruned(nn.Linear(50, 60)).to(device, dtype), **options)


def step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *model.parameters()))]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_autocast_is_a_cast_of_every_operand(dtype: torch.dtype, activation: str | None, device: str) -> None:
    """Bit for bit the cast layer, but every gradient arrives in the dtype of its tensor."""
    model = layer(device, activation=activation)
    x = torch.randn(4, 50, device=device)

    def by_hand(x: Tensor) -> Tensor:
        values, bias = model.values.to(dtype), model.bias.to(dtype)
        return ops.spmm(model.matrix.with_values(values), x.to(dtype), bias, activation=activation)

    with torch.autocast(device, dtype=dtype):
        got = step(model, model, x)
        dense = F.linear(x, model.matrix.to_dense(), model.bias)
    for mine, want in zip(got, step(by_hand, model, x), strict=True):
        assert torch.equal(mine, want)
    assert got[0].dtype == dense.dtype == dtype
    assert {g.dtype for g in got[1:]} == {torch.float32}
    if activation is None:
        half = copy.deepcopy(model).to(dtype)
        compare(got[0], expect_spmm(half.matrix, x.to(dtype), half.bias))


@pytest.mark.parametrize("name", ["spmm", "spmm_t"])
def test_both_products_are_cast(name: str, device: str) -> None:
    w = random_matrix(60, 60, 0.5, device=device)
    x = torch.randn(4, 60, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert getattr(ops, name)(w, x).dtype == torch.bfloat16
        assert ops.sddmm(w, x, x).dtype == torch.float32
        assert (w @ x.t()).dtype == torch.bfloat16


def test_a_nested_region_switches_it_off(device: str) -> None:
    model = layer(device)
    x = torch.randn(4, 50, device=device)
    want = model(x)
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        assert torch.equal(model(x), want)
    other = "cuda" if device == "cpu" else "cpu"
    with torch.autocast(other, dtype=torch.bfloat16, enabled=other == "cpu" or torch.cuda.is_available()):
        assert torch.equal(model(x), want), "autocast of another device"


def test_what_linear_leaves_alone_is_left_alone(device: str) -> None:
    x = torch.randn(4, 50, device=device)
    wide = layer(device, torch.float64)
    dense = wide.to_dense()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert wide(x.double()).dtype == dense(x.double()).dtype == torch.float64
        for model, operand in ((layer(device), x.double()), (layer(device), x.int()), (wide, x)):
            for either in (model.to_dense(), model):
                with pytest.raises(RuntimeError, match="dtype|scalar type"):
                    either(operand)
        assert layer(device, torch.float16)(x).dtype == torch.bfloat16


def test_meta_tensors_know_no_autocast() -> None:
    model = layer("cpu").to("meta")
    x = torch.randn(4, 50, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == nn.Linear(50, 60, device="meta")(x).dtype == torch.float32


def test_backward_and_double_backward_inside_the_region(device: str) -> None:
    """Not recommended, but done: products of the backward are then cast too."""
    model = layer(device)
    dense = model.to_dense()
    results = []
    x = torch.randn(4, 50, device=device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        for net in (model, dense):
            (first,) = torch.autograd.grad(net(x).float().square().sum(), x, create_graph=True)
            (bias,) = torch.autograd.grad(first.square().sum(), net.bias)
            assert first.dtype == bias.dtype == torch.float32
            results.append((first.detach(), bias))
    for mine, theirs in zip(*results, strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        assert error < 8 * 2**-8, error  # half a unit of bfloat16 for each of the roundings on the way


def test_convolution(device: str) -> None:
    conv = pruned(nn.Conv2d(8, 24, 1)).to(device)
    model = CSBConv2d.from_dense(conv)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 5, 5, device=device).to(memory_format=memory_format)
        with torch.autocast(device, dtype=torch.bfloat16):
            y, want = model(x), conv(x)
        assert y.dtype == want.dtype == torch.bfloat16 and y.is_contiguous(memory_format=memory_format)
        error = (y.float() - want.float()).norm() / want.float().norm()
        assert error < 2 * 2**-8, error


def test_checkpoint_remembers_the_region(device: str) -> None:
    model = layer(device)
    x = torch.randn(4, 50, device=device)
    for use_reentrant in (True, False):
        leaf = x.clone().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            y = checkpoint(model, leaf, use_reentrant=use_reentrant)
            want = step(model, model, x)
        y.float().square().sum().backward()
        got = [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        model.zero_grad()


def test_transforms_inside_the_region(device: str) -> None:
    model = layer(device)
    x = torch.randn(4, 50, device=device)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, params, (x,)).float().square().sum()

    with torch.autocast(device, dtype=torch.bfloat16):
        got = vmap(grad(loss), in_dims=(None, 0))(params, x)
        want = [step(model, model, one)[2:] for one in x]
    for i, name in enumerate(params):
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], torch.stack([w[i] for w in want]), rtol=2e-2, atol=2e-2)


def test_compiled_in_one_graph(device: str) -> None:
    model = layer(device, activation="relu")
    x = torch.randn(4, 50, device=device)
    torch._dynamo.reset()

    def inside(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(x)

    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(step(compiled, model, x), step(inside, model, x), strict=True))
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        got, want = step(whole, model, x), step(model, model, x)
    assert got[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_grad_scaler_trains_as_without(device: str) -> None:
    """A power of two scales float32 gradients exactly: three steps end in the same bits as three without it."""
    model = nn.Sequential(layer(device, activation="relu"), nn.Linear(60, 3)).to(device)
    x, target = torch.randn(8, 50, device=device), torch.randn(8, 3, device=device)
    ends = []
    for enabled in (True, False):
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=enabled)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = F.mse_loss(net(x).float(), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append(list(net.parameters()))
        assert not torch.equal(net[0].values, model[0].values)
    for scaled, plain in zip(*ends, strict=True):
        assert torch.equal(scaled, plain)


def test_grad_scaler_skips_a_step_that_overflows(device: str) -> None:
    model = layer(device)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**30)
    with torch.autocast(device, dtype=torch.float16):
        loss = model(torch.ones(4, 50, device=device)).float().sum()
    scaler.scale(loss).backward()
    assert not model.values.grad.isfinite().all()
    assert (model.values.grad[~model.matrix.is_entry] == 0).all()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
