"""Derivatives against finite differences in float64 and against the dense masked layer in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, activation, build, random_matrix
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from torch_csb import CSBMatrix, ops, reference
from torch_csb.testing import matrix

Function = Callable[..., Tensor]


def small(device: str, block_size: int | str = 16, m: int = 19, k: int = 22) -> CSBMatrix:
    return random_matrix(m, k, 0.6, torch.float64, device, block_size)


@pytest.mark.parametrize("layout", ["rows", "columns", "nchw", "transposed"])
@pytest.mark.parametrize("op", [ops.spmm, ops.spmm_t], ids=lambda op: op.__name__)
@pytest.mark.parametrize("blocks", [16, "bitmap"])
def test_gradcheck_products(blocks: int | str, op: Function, layout: str, device: str) -> None:
    w = small(device, blocks)
    inputs, outputs = (w.k, w.m) if op is ops.spmm else (w.m, w.k)
    x, dim = activation(layout, inputs, 6, torch.float64, device)
    bias = torch.randn(outputs, dtype=torch.float64, device=device)
    args = (w.values.clone().requires_grad_(), x.detach().requires_grad_(), bias.requires_grad_())

    def run(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return op(w.with_values(values), x, bias, dim=dim)

    assert gradcheck(run, args, fast_mode=False)
    assert gradgradcheck(run, args)


@pytest.mark.parametrize("layout", ["rows", "nchw"])
@pytest.mark.parametrize("blocks", [16, "bitmap"])
def test_gradcheck_sddmm(blocks: int | str, layout: str, device: str) -> None:
    w = small(device, blocks)
    a, dim = activation(layout, w.m, 6, torch.float64, device)
    b, _ = activation(layout, w.k, 6, torch.float64, device)
    args = (a.requires_grad_(), b.requires_grad_())

    def run(a: Tensor, b: Tensor) -> Tensor:
        return ops.sddmm(w, a, b, dim=dim)

    assert gradcheck(run, args)
    assert gradgradcheck(run, args)


@pytest.mark.parametrize("act", ACTIVATIONS[1:])
@pytest.mark.parametrize("op", [ops.spmm, ops.spmm_t], ids=lambda op: op.__name__)
def test_gradcheck_activations(op: Function, act: str, device: str) -> None:
    """relu and relu6 have corners; the bias keeps every sum away from them."""
    w = small(device, m=7, k=9)
    inputs, outputs = (w.k, w.m) if op is ops.spmm else (w.m, w.k)
    x = torch.randn(3, inputs, dtype=torch.float64, device=device) * 0.1
    bias = torch.tensor([-3.0, 2.0, 9.0], dtype=torch.float64, device=device).repeat(outputs)[:outputs]
    pre = op(w, x, bias)
    assert min((pre - corner).abs().min() for corner in (0, 6)) > 1e-3
    args = (w.values.clone().requires_grad_(), x.requires_grad_(), bias.requires_grad_())

    def run(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return op(w.with_values(values), x, bias, activation=act)

    assert gradcheck(run, args)
    assert gradgradcheck(run, args)


@pytest.mark.parametrize("name", ["70x0", "empty", "one_dense_row", "edge_65x63", "uniform_90"])
@pytest.mark.parametrize("layout", ["rows", "nchw_strided", "channels_last"])
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
def test_gradients_of_the_dense_masked_layer(name: str, layout: str, act: str | None, device: str) -> None:
    w = build(matrix(name), device=device, block_size=64)
    x, dim = activation(layout, w.k, 24, torch.float32, device)
    bias = torch.randn(w.m, device=device)
    dense = w.to_dense().requires_grad_()
    x_csb, x_dense = (x.detach().requires_grad_() for _ in range(2))
    bias_csb, bias_dense = (bias.clone().requires_grad_() for _ in range(2))
    w.values.requires_grad_()

    got = ops.spmm(w, x_csb, bias_csb, activation=act, dim=dim)
    want = reference.apply(dense, x_dense, bias_dense, act, dim)
    grad = torch.randn_like(want)
    got.backward(grad)
    want.backward(grad)

    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, want, **tolerance)
    torch.testing.assert_close(x_csb.grad, x_dense.grad, **tolerance)
    torch.testing.assert_close(bias_csb.grad, bias_dense.grad, **tolerance)
    at = reference.decode(w)
    torch.testing.assert_close(w.values.grad[at.index], dense.grad[at.row, at.col], **tolerance)


def test_padding_never_gets_a_gradient(device: str) -> None:
    """Exactly zero, also where an activation is infinite: a NaN there would spread through gradient clipping."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        w = random_matrix(90, 90, 0.7, dtype, device, 16)
        padding = ~w.is_entry
        assert padding.any()
        w.values.requires_grad_()
        for fill in (1.0, torch.inf, torch.nan):
            x = torch.full((9, 90), fill, dtype=dtype, device=device)
            (grad,) = torch.autograd.grad(ops.spmm(w, x), w.values, torch.ones(9, 90, dtype=dtype, device=device))
            assert (grad[padding] == 0).all(), (dtype, fill)
            assert (grad[~padding] != 0).any()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_any_subset_of_gradients(needs: tuple[bool, bool, bool], act: str | None, device: str) -> None:
    w = random_matrix(60, 50, 0.5, device=device)
    x, bias = torch.randn(5, 50, device=device), torch.randn(60, device=device)
    tensors = (w.values, x, bias)
    plain = ops.spmm(w, x, bias, activation=act)
    full = [t.clone().requires_grad_() for t in tensors]
    y = ops.spmm(w.with_values(full[0]), *full[1:], activation=act)
    grad = torch.randn_like(y)
    want = torch.autograd.grad(y, full, grad)

    asked = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    y = ops.spmm(w.with_values(asked[0]), *asked[1:], activation=act)
    assert y.requires_grad == any(needs)
    torch.testing.assert_close(y.detach(), plain)
    if any(needs):
        got = torch.autograd.grad(y, [t for t in asked if t.requires_grad], grad)
        for a, b in zip(got, itertools.compress(want, needs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_without_gradients_the_result_is_the_same(act: str | None, device: str) -> None:
    w = random_matrix(60, 50, 0.5, device=device)
    w.values.requires_grad_()
    x = torch.randn(5, 50, device=device)
    trained = ops.spmm(w, x, activation=act)
    assert trained.grad_fn is not None
    with torch.no_grad():
        free = ops.spmm(w, x, activation=act)
    with torch.inference_mode():
        inferred = ops.spmm(w, x, activation=act)
    assert free.grad_fn is None and torch.equal(free, inferred)
    if act in (None, "relu", "relu6"):  # silu and gelu are fused only where no gradient is needed
        assert torch.equal(trained, free)
    torch.testing.assert_close(trained, free)


def test_relu_gradient_at_nan_follows_torch(device: str) -> None:
    w = CSBMatrix.from_dense(torch.eye(3, device=device))
    x = torch.tensor([[torch.nan, 0.0, 7.0]], device=device)
    for act, torch_act in (("relu", F.relu), ("relu6", F.relu6)):
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        ops.spmm(w, mine, activation=act).sum().backward()
        torch_act(theirs).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, equal_nan=True)


def test_grad_of_a_strided_or_expanded_gradient(device: str) -> None:
    """sum() sends back a stride-0 gradient, a transposed loss a strided one."""
    w = random_matrix(60, 50, 0.5, torch.float64, device)
    x = torch.randn(6, 50, dtype=torch.float64, device=device, requires_grad=True)
    (from_sum,) = torch.autograd.grad(ops.spmm(w, x).sum(), x)
    torch.testing.assert_close(from_sum, w.to_dense().sum(0).expand(6, 50))
    weight = torch.randn(60, 6, dtype=torch.float64, device=device)
    (strided,) = torch.autograd.grad((ops.spmm(w, x).t() * weight).sum(), x)
    torch.testing.assert_close(strided, weight.t() @ w.to_dense())


def test_transposed_view_trains_the_same_values(device: str) -> None:
    w = random_matrix(60, 50, 0.5, torch.float64, device)
    w.values.requires_grad_()
    y = torch.randn(4, 60, dtype=torch.float64, device=device)
    (by_view,) = torch.autograd.grad(ops.spmm(w.t(), y).square().sum(), w.values)
    (by_name,) = torch.autograd.grad(ops.spmm_t(w, y).square().sum(), w.values)
    assert torch.equal(by_view, by_name) and (by_view != 0).any()


def test_a_used_weight_may_not_change_before_backward(device: str) -> None:
    w = random_matrix(60, 50, 0.5, device=device)
    w.values.requires_grad_()
    y = ops.spmm(w, torch.randn(4, 50, device=device, requires_grad=True))
    with torch.no_grad():
        w.values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
