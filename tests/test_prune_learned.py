"""Variational dropout and L0: formulas by hand, gradients, what they draw, and what finish() leaves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import torch_csb
from torch_csb.prune import L0, VariationalDropout
from torch_csb.prune.l0 import final_gate, open_probability, sampled_gate
from torch_csb.prune.variational import kl_divergence, log_alpha

METHODS = {
    "variational": lambda seed, **kw: VariationalDropout(3e-3, log_sigma2=-6.0, lr=5e-2, generator=seeded(seed), **kw),
    "l0": lambda seed, **kw: L0(1e-3, lr=5e-2, generator=seeded(seed), **kw),
}


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request):
    return request.param


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def net():
    torch.manual_seed(1)
    conv = nn.Conv2d(1, 8, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(128, 48), nn.ReLU(), nn.Linear(48, 2))


def task():
    x = torch.randn(256, 1, 4, 4, generator=seeded(0))
    return x, (x[:, 0, 0].sum(1) > 0).long()


def train(make, seed, steps=200, model=None, **kw):
    model = net() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    pruner = make(seed, warmup=(20, 60), **kw).prepare(model, optimizer)
    x, y = task()
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + pruner.penalty()).backward()
        optimizer.step()
        pruner.step()
    return model, pruner, optimizer


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_log_alpha_by_hand():
    found = log_alpha(numbers(1.0, 0.5, 0.0), numbers(-2.0, -2.0, -2.0))
    # The 1e-8 under the logarithm matters at 0 alone.
    torch.testing.assert_close(found, numbers(-2, -2 + 2 * math.log(2), -2 + 8 * math.log(10)), atol=1e-7, rtol=0)
    assert log_alpha(torch.ones(1).bfloat16(), torch.ones(1).bfloat16()).dtype == torch.float32


def test_kl_divergence_by_hand():
    # At log α = 0: 0.63576 · (1 - sigmoid(1.8732)) + log(2) / 2.
    torch.testing.assert_close(kl_divergence(numbers(0.0)), numbers(0.43123), atol=1e-5, rtol=0)
    for x in (-5.0, 3.0):
        by_hand = 0.63576 - 0.63576 * sigmoid(1.8732 + 1.48695 * x) + 0.5 * math.log(1 + math.exp(-x))
        torch.testing.assert_close(kl_divergence(numbers(x)), numbers(by_hand))


def test_hard_concrete_gates_by_hand():
    # sigmoid(0) = 1/2 -> 0.6 - 0.1; sigmoid(3) · 1.2 - 0.1 = 1.043; sigmoid(-3) · 1.2 - 0.1 = -0.043.
    torch.testing.assert_close(final_gate(numbers(0.0, 3.0, -3.0)), numbers(0.5, 1.0, 0.0))
    # u = 0.6: log(0.6 / 0.4) / (2/3) = 1.5 · log 1.5.
    gates = sampled_gate(numbers(0.0, 0.0, 0.0, 0.0), numbers(0.0, 0.5, 0.6, 0.99))
    torch.testing.assert_close(gates, numbers(0, 0.5, 1.2 * sigmoid(1.5 * math.log(1.5)) - 0.1, 1))
    # -β · log(-γ/ζ) = 2/3 · log 11 = 1.5986.
    torch.testing.assert_close(open_probability(numbers(0.0)), numbers(sigmoid(1.5985968)), atol=1e-7, rtol=0)


@pytest.mark.parametrize("at", [-3.0, 0.0, 2.0])
def test_open_probability_is_the_share_of_open_gates(at):
    u = torch.rand(200_000, dtype=torch.float64, generator=seeded(0))
    share = (sampled_gate(torch.full_like(u, at), u) > 0).double().mean()
    assert abs(share - open_probability(numbers(at))) < 4 * 0.5 / len(u) ** 0.5


def test_the_threshold_on_log_alpha():
    layer = nn.Linear(3, 1, bias=False)
    pruner = VariationalDropout(0.0, log_sigma2=-2.0).prepare(nn.Sequential(layer))
    # log α = -2 - 2 · log θ: 3.01, 2.99 and -2.
    theta = [math.exp(-2.505), -math.exp(-2.495), 1.0]
    layer.parametrizations.weight.original.data = torch.tensor([theta])
    assert pruner.masks["0"].tolist() == [[False, True, True]]
    layer.eval()
    torch.testing.assert_close(layer.weight, torch.tensor([[0.0, *theta[1:]]]))
    strict = VariationalDropout(0.0, log_sigma2=-2.0, threshold=-3.0).prepare(nn.Sequential(nn.Linear(2, 2)))
    assert strict.sparsity()["0"] == 1.0


def test_l0_starts_at_the_dropout_rate():
    layer = nn.Linear(4, 4)
    pruner = L0(1.0, dropout_rate=0.2).prepare(nn.Sequential(layer))
    log_alpha = layer.parametrizations.weight[0].log_alpha
    torch.testing.assert_close(log_alpha, torch.full((4, 4), math.log(0.8 / 0.2)))
    # Σ P(z ≠ 0)
    torch.testing.assert_close(pruner.penalty(), torch.tensor(16 * sigmoid(math.log(4) + 2 / 3 * math.log(11))))


def test_the_penalty_ramps_up():
    pruner = L0(4.0, warmup=(1, 3)).prepare(nn.Sequential(nn.Linear(4, 4)))
    seen = []
    for _ in range(5):
        seen.append(pruner.penalty().item())
        pruner.step()
    assert seen == pytest.approx([0, 0, seen[-1] / 2, seen[-1], seen[-1]]) and seen[-1] > 0


def test_it_gets_sparse_learns_the_task_and_finishes_as_prune_masks(method):
    model, pruner, optimizer = train(method, 5)
    (x, y), weights = task(), {name: each.original for name, each in _parametrizations(pruner).items()}
    before = model.eval()(x)
    masks = pruner.finish()
    assert (before.argmax(1) == y).double().mean() > 0.9
    assert sum(int(mask.sum()) for mask in masks.values()) < 0.5 * sum(mask.numel() for mask in masks.values())
    assert torch.equal(model(x), before)
    for name, layer in pruner.layers.items():
        assert prune.is_pruned(layer) and not parametrize.is_parametrized(layer) and not layer._forward_hooks
        assert layer.weight_orig is weights[name]
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all((layer.weight_orig[~masks[name]] == 0).all() for name, layer in pruner.layers.items())
    assert all(len(optimizer.state[each]) > 0 for group in optimizer.param_groups for each in group["params"])
    expected = model.eval()(x)
    torch_csb.sparsify_(model, min_sparsity=0.0)
    assert type(model[3]) is torch_csb.CSBLinear and model[3].nnz == masks["3"].sum()
    torch.testing.assert_close(model(x), expected)


def _parametrizations(pruner):
    return {name: layer.parametrizations.weight for name, layer in pruner.layers.items()}


def test_masks_are_determined_by_the_generator(method):
    first, again, other = (train(method, seed, steps=120)[1].masks for seed in (5, 5, 6))
    assert same(first, again) and not same(first, other)


def test_the_trained_numbers_have_a_group_without_decay_that_stays(method):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    pruner = method(0).prepare(model, optimizer)
    assert [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (6, 3e-3, 0.1),
        (3, 5e-2, 0.0),
    ]
    rate = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    pruner.finish()
    assert optimizer.param_groups[1]["params"] == []
    optimizer.step()
    rate.step()


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.95, 1.0])
def test_cut_reaches_what_is_asked_for(method, sparsity):
    model, pruner, _ = train(method, 1, steps=120)
    natural = pruner.masks
    assert not natural["3"].all()
    pruner.cut(sparsity)
    model.eval()
    masks, total = pruner.masks, sum(mask.numel() for mask in natural.values())
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    if sparsity == 0.0 and isinstance(pruner, L0):
        assert same(masks, natural)  # what has a gate of 0 stays pruned
    else:
        assert pruned == round(sparsity * total)
    x, _ = task()
    before = model(x)
    assert same(pruner.finish(), masks) and torch.equal(model(x), before)
    with pytest.raises(RuntimeError, match="cut: expected a running pruner"):
        pruner.cut(0.5)


def test_cut_drops_the_noisiest_of_all_layers():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 30))
    model[0].weight.data.uniform_(1e-3, 2e-3)
    model[1].weight.data.uniform_(0.5, 1)
    pruner = VariationalDropout(0.0).prepare(model)
    pruner.cut(0.25)
    assert pruner.sparsity() == {"0": 1.0, "1": 0.0}
    with pytest.raises(ValueError, match="sparsity: expected a number from 0 to 1, got 1.5"):
        pruner.cut(1.5)


def test_what_was_pruned_before_stays_pruned(method):
    model = net()
    prune.l1_unstructured(model[3], "weight", 0.5)
    prior = model[3].weight_mask.bool().clone()
    _, pruner, _ = train(method, 1, steps=3, model=model)
    pruner.warmup = (0, 0)
    costs = pruner.penalty().item()
    gate, theta = pruner._gates()["3"]
    number = next(gate.parameters())
    with torch.no_grad():
        theta[~prior], number[~prior] = 9.0, 9.0
    assert pruner.penalty().item() == pytest.approx(costs) and costs > 0
    with torch.no_grad():
        for each, _ in pruner._gates().values():
            trained = next(each.parameters())
            trained += 0.1 * torch.rand_like(trained)  # after three steps many are equal, and would go together
    total = sum(mask.numel() for mask in pruner.masks.values())
    pruner.cut(0.75)
    # What was pruned before counts.
    assert sum(int((~mask).sum()) for mask in pruner.masks.values()) == round(0.75 * total)
    pruner.cut(0.0)
    assert torch.equal(pruner.masks["3"], prior)
    assert gate.kept.dtype == torch.float32
    assert (pruner.finish()["3"] <= prior).all() and (model[3].weight_orig[~prior] == 0).all()


def test_weights_that_were_pruned_before_make_no_noise():
    model = nn.Sequential(nn.Linear(4, 3))
    prune.custom_from_mask(model[0], "weight", torch.zeros(3, 4))
    VariationalDropout(1.0, log_sigma2=0.0).prepare(model)
    assert torch.equal(model(torch.randn(5, 4)), model[0].bias.expand(5, 3))


def test_gradients_agree_with_differences_and_are_finite_at_zero(method):
    model = net().double()
    pruner = method(0).prepare(model)
    model[3].parametrizations.weight.original.data[0, 0] = 0
    (model(torch.zeros(4, 1, 4, 4, dtype=torch.float64)).sum() + pruner.penalty()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    number = next(model[5].parametrizations.weight[0].parameters())
    model.zero_grad()
    pruner.penalty().backward()
    grad, h = number.grad[0, 0].item(), 1e-5
    with torch.no_grad():
        number[0, 0] += h
        up = pruner.penalty().item()
        number[0, 0] -= 2 * h
        down = pruner.penalty().item()
    assert grad != 0 and (up - down) / (2 * h) == pytest.approx(grad, rel=1e-4)


def test_the_noise_has_the_moments_of_noise_on_weights():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"))
    VariationalDropout(1.0, log_sigma2=-1.0, generator=seeded(0)).prepare(model)
    x = torch.randn(1, 2, 4, 4)
    mean = model.eval()(x).detach()
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(x) for _ in range(3000)])
        sigma2 = torch.full((3, 2, 3, 3), math.exp(-1.0))
        variance = model[0]._conv_forward(x * x, sigma2, None)
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0)
    # In evaluation mode θ² e^3 < σ² prunes all that is small; the mean in training is that of θ itself.
    theta = model[0].parametrizations.weight.original
    expected = model[0]._conv_forward(x, theta, model[0].bias).detach()
    assert ((draws.mean(0) - expected).abs() < 5 * (variance / 3000).sqrt()).all() and not torch.equal(mean, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariationalDropout(-1.0), "weight: expected a number from 0, got -1.0"),
        (lambda: VariationalDropout(1.0, warmup=(3, 2)), "warmup: expected"),
        (lambda: L0(1.0, lr=-1.0), "lr: expected None or a number from 0"),
        (lambda: L0(float("nan")), "weight: expected"),
        (lambda: L0(1.0, dropout_rate=1.0), "dropout_rate: expected a number between 0 and 1"),
        (lambda: L0(1.0, beta=0.0), "beta: expected"),
        (lambda: L0(1.0, gamma=0.1), "gamma, zeta: expected"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
