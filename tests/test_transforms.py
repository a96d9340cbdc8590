"""torch.func and forward-mode AD: what the dense net does there, the sparse one does too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import activation, build, random_matrix
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from transform_cases import DOUBLE, Calls, images, nets, pruned, sampled

from torch_csb import CSBLinear, ops
from torch_csb.testing import matrix


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda params, x: functional_call(model, params, (x,)).square().sum()


@pytest.mark.parametrize("layout", ["rows", "nchw"])
@pytest.mark.parametrize("op", [ops.spmm, ops.spmm_t], ids=lambda op: op.__name__)
def test_gradcheck_in_every_mode(op: Callable[..., Tensor], layout: str, device: str) -> None:
    """Forward mode, vmap over backward and over forward mode, double backward, forward over backward."""
    w = random_matrix(19, 22, 0.6, DOUBLE, device, 16)
    inputs, outputs = (w.k, w.m) if op is ops.spmm else (w.m, w.k)
    x, dim = activation(layout, inputs, 6, DOUBLE, device)
    bias = torch.randn(outputs, dtype=DOUBLE, device=device)
    args = (w.values.clone().requires_grad_(), x.detach().requires_grad_(), bias.requires_grad_())

    def run(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return op(w.with_values(values), x, bias, dim=dim)

    assert gradcheck(run, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(run, args, check_fwd_over_rev=True, check_batched_grad=True)


def test_gradcheck_of_sddmm_in_every_mode(device: str) -> None:
    w = random_matrix(19, 22, 0.6, DOUBLE, device, 16)
    a, dim = activation("nchw", w.m, 6, DOUBLE, device)
    b, _ = activation("nchw", w.k, 6, DOUBLE, device)
    args = (a.requires_grad_(), b.requires_grad_())

    def run(a: Tensor, b: Tensor) -> Tensor:
        return ops.sddmm(w, a, b, dim=dim)

    assert gradcheck(run, args, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(run, args, check_fwd_over_rev=True, check_batched_grad=True)


def test_grad_of_functional_call(device: str) -> None:
    dense, model = nets(device)
    x = images(device)
    got = grad(loss(model))(parameters(model), x)
    want = sampled(model, grad(loss(dense))(parameters(dense), x))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad(loss(model), 1)(parameters(model), x), grad(loss(dense), 1)(parameters(dense), x))


def test_functional_call_with_the_own_state_dict(device: str) -> None:
    _, model = nets(device)
    x = images(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(functional_call(model, state, (x,)), model(x))
    doubled = {name: 2 * t if t.is_floating_point() else t for name, t in state.items()}
    twice = copy.deepcopy(model)
    twice.load_state_dict(doubled)
    torch.testing.assert_close(functional_call(model, doubled, (x,)), twice(x))


def test_per_sample_gradients(device: str) -> None:
    dense, model = nets(device)
    x = images(device)
    got = vmap(grad(loss(model)), in_dims=(None, 0))(parameters(model), x)
    want = sampled(model, vmap(grad(loss(dense)), in_dims=(None, 0))(parameters(dense), x))
    torch.testing.assert_close(got, want)
    assert got["first.values"].shape == (4, model.first.values.numel())
    summed = grad(loss(model))(parameters(model), x)
    torch.testing.assert_close({name: g.sum(0) for name, g in got.items()}, summed)
    nothing = vmap(grad(loss(model)), in_dims=(None, 0))(parameters(model), x[:0])
    assert nothing["first.values"].shape == (0, model.first.values.numel())


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap_over_inputs_is_one_product(in_dim: int, device: str) -> None:
    dense, model = nets(device)
    x = images(device, 5)
    with torch.no_grad(), Calls() as calls:
        got = vmap(model, in_dims=in_dim)(x.movedim(0, in_dim))
    torch.testing.assert_close(got, dense(x))
    assert calls.names == ["spmm"] * 3
    assert vmap(model)(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("op", [ops.spmm, ops.spmm_t], ids=lambda op: op.__name__)
def test_vmap_keeps_the_feature_dimension(op: Callable[..., Tensor], dim: int, device: str) -> None:
    w = random_matrix(19, 22, 0.6, DOUBLE, device, 16)
    features = w.k if op is ops.spmm else w.m
    x = torch.randn(3, features, 2, 4, dtype=DOUBLE, device=device).movedim(1, 1 + dim % 3)
    want = torch.stack([op(w, element, dim=dim) for element in x])
    torch.testing.assert_close(vmap(lambda x: op(w, x, dim=dim))(x), want)
    nested = vmap(lambda x: vmap(lambda x: op(w, x, dim=dim), in_dims=1, out_dims=1)(x))
    deep = torch.stack([x, -x], 2)
    torch.testing.assert_close(nested(deep), torch.stack([want, -want], 2))


@pytest.mark.parametrize("batched", range(1, 8))
def test_vmap_over_any_arguments(batched: int, device: str) -> None:
    """values, x and bias in every combination."""
    w = build(matrix("edge_65x63"), DOUBLE, device, 16)
    values = torch.randn(3, w.values.numel(), dtype=DOUBLE, device=device)
    x, bias = torch.randn(3, 2, w.k, dtype=DOUBLE, device=device), torch.randn(3, w.m, dtype=DOUBLE, device=device)
    in_dims = tuple(0 if batched >> i & 1 else None for i in range(3))
    args = [t if dim == 0 else t[0] for t, dim in zip((values, x, bias), in_dims, strict=True)]

    def run(values: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return ops.spmm(w.with_values(values), x, bias, activation="silu")

    each = [run(*(t[i] if dim == 0 else t[0] for t, dim in zip((values, x, bias), in_dims, strict=True)))
            for i in range(3)]  # fmt: skip
    torch.testing.assert_close(vmap(run, in_dims=in_dims)(*args), torch.stack(each))


@pytest.mark.parametrize("patterns", ["one", "each its own"])
def test_ensemble(patterns: str, device: str) -> None:
    """Stacked modules. Every member may have a pattern of its own, as long as all store the same number of entries."""

    def member(seed: int) -> CSBLinear:
        layer = nn.Linear(20, 33, dtype=DOUBLE)
        order = torch.randperm(660, generator=torch.Generator().manual_seed(seed if patterns != "one" else 0))
        mask = torch.zeros(660, dtype=torch.bool)
        mask[order[:200]] = True
        return CSBLinear.from_dense(layer.to(device), mask.view(33, 20).to(device), block_size=64)

    members = [member(seed) for seed in range(3)]
    params, buffers = stack_module_state(members)
    x = torch.randn(4, 20, dtype=DOUBLE, device=device)

    def run(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0], (params, buffers), (x,))

    got, want = vmap(run)(params, buffers), torch.stack([model(x) for model in members])
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(got)
    mine = torch.autograd.grad(got, list(params.values()), cotangent)
    theirs = torch.autograd.grad(want, [p for model in members for p in model.parameters()], cotangent)
    torch.testing.assert_close(mine[0], torch.stack(theirs[0::2]))
    torch.testing.assert_close(mine[1], torch.stack(theirs[1::2]))


def test_ensemble_of_other_sizes_is_refused() -> None:
    members = [CSBLinear.from_dense(pruned(nn.Linear(64, 64), seed)) for seed in range(2)]
    with pytest.raises(RuntimeError, match="equal size"):
        stack_module_state(members)


def test_jvp_of_everything_at_once(device: str) -> None:
    dense, model = nets(device)
    x = images(device)
    tangents, dx = {name: torch.randn_like(p) for name, p in parameters(dense).items()}, torch.randn_like(x)
    for name in ("conv", "first", "second"):  # a tangent outside the pattern is none of ours
        tangents[f"{name}.weight"] *= getattr(dense, name).weight != 0
    run = [lambda params, x, net=net: functional_call(net, params, (x,)) for net in (model, dense)]
    got = jvp(run[0], (parameters(model), x), (sampled(model, tangents), dx))
    want = jvp(run[1], (parameters(dense), x), (tangents, dx))
    torch.testing.assert_close(got, want)
    _, push = linearize(run[0], parameters(model), x)
    torch.testing.assert_close(push(sampled(model, tangents), dx), want[1])


@pytest.mark.parametrize("which", ["values", "x", "bias"])
def test_jvp_of_one_argument(which: str, device: str) -> None:
    w = random_matrix(19, 22, 0.6, DOUBLE, device, 16)
    tensors = {"values": w.values, "x": torch.randn(3, 22).to(w.values), "bias": torch.randn(19).to(w.values)}
    tangent = torch.randn_like(tensors[which])

    def run(one: Tensor) -> Tensor:
        args = tensors | {which: one}
        return ops.spmm(w.with_values(args["values"]), args["x"], args["bias"])

    _, got = jvp(run, (tensors[which],), (tangent,))
    torch.testing.assert_close(got, run(tensors[which] + tangent) - run(tensors[which]))  # linear in each argument


def test_jacobians_and_hessians(device: str) -> None:
    dense, model = nets(device)
    x = images(device, 1)[0]
    torch.testing.assert_close(jacfwd(model)(x), jacfwd(dense)(x))
    torch.testing.assert_close(jacrev(model)(x), jacrev(dense)(x))

    def total(net: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x).square().sum()

    want = hessian(total(dense))(x)
    assert want.abs().max() > 1e-3
    for way in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacrev(jacrev(f))):
        torch.testing.assert_close(way(total(model))(x), want)
    vectorized = torch.autograd.functional.hessian(total(model), x, vectorize=True)
    torch.testing.assert_close(vectorized, want)
    _, pull = vjp(total(model), x)
    torch.testing.assert_close(pull(torch.ones((), dtype=DOUBLE, device=device))[0], grad(total(dense))(x))


def test_what_vjp_returns_is_differentiable_outside(device: str) -> None:
    """The saved tensors are then wrappers of a transform that has ended."""
    dense, model = nets(device)
    cotangent = torch.randn(4, 5, dtype=DOUBLE, device=device, requires_grad=True)
    x = images(device)
    got, want = (torch.autograd.grad(vjp(lambda x, net=net: net(x), x)[1](cotangent)[0].square().sum(), cotangent)
                 for net in (model, dense))  # fmt: skip
    torch.testing.assert_close(got, want)


def test_batched_gradients_of_an_eager_graph(device: str) -> None:
    dense, model = nets(device)
    x = images(device).requires_grad_()
    basis = torch.eye(20, dtype=DOUBLE, device=device).view(20, 4, 5)
    got, want = (torch.autograd.grad(net(x), x, basis, is_grads_batched=True) for net in (model, dense))
    torch.testing.assert_close(got, want)


def test_forward_ad_with_dual_parameters(device: str) -> None:
    """As in torch's tutorial: the Parameters are deleted and dual tensors take their places."""
    dense, model = nets(device)
    x = images(device)
    results = []
    for net in (model, dense):
        net = copy.deepcopy(net)
        with forward_ad.dual_level():
            for name, parameter in parameters(net).items():
                module, attribute = net.get_submodule(name.split(".")[0]), name.split(".")[1]
                delattr(module, attribute)
                setattr(module, attribute, forward_ad.make_dual(parameter, parameter.sin() * (parameter != 0)))
            results.append(forward_ad.unpack_dual(net(forward_ad.make_dual(x, x.cos()))).tangent)
    torch.testing.assert_close(results[0], results[1])
    assert results[0].abs().max() > 1e-3


def test_a_compiled_transform_stays_eager(device: str) -> None:
    """A graph break, an error where the user forbids it; never a graph that would lose a derivative."""
    model = CSBLinear.from_dense(pruned(nn.Linear(20, 33))).to(device)
    x = torch.randn(4, 20, device=device)
    per_sample = vmap(grad(loss(model)), in_dims=(None, 0))
    torch._dynamo.reset()
    got = torch.compile(per_sample, backend="aot_eager")(parameters(model), x)
    torch.testing.assert_close(got, per_sample(parameters(model), x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="torch_csb's operators inside a torch.func transform"):
        torch.compile(per_sample, backend="aot_eager", fullgraph=True)(parameters(model), x)


@pytest.mark.parametrize("trained", [True, False])
def test_forward_ad_of_a_compiled_layer(trained: bool, device: str) -> None:
    """First called without tangents, so that a graph is there which knows none."""
    layer = CSBLinear.from_dense(pruned(nn.Linear(20, 33))).to(device).requires_grad_(trained)
    x = torch.randn(4, 20, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(got, layer(x) - layer.bias)
