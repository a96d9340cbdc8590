"""Coarse pruning: whole units, the best candidate, what is logged, and that nothing moves what is pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import torch_csb
from torch_csb.prune import Coarse, CubicSchedule, GradualMagnitude


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.mix = nn.Conv2d(8, 20, 1)
        self.head = nn.Linear(20, 10)

    def forward(self, x):
        return self.head(torch.relu(self.mix(torch.relu(self.conv(x)))).mean((2, 3)))


def now(final):
    return CubicSchedule.one_shot(final, at=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kept_weight(model):
    """An error without data: the more of the mix layer's weight is kept, the lower."""
    return -(model.mix.weight_orig * model.mix.weight_mask).abs().sum().item()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_feature_maps_go_whole_with_their_bias_and_feed_zeros():
    model = Net()
    masks = Coarse(now(0.5), kept_weight, exclude="head", generator=seeded()).prepare(model).finish()
    assert masks.keys() == {"conv", "mix"}
    for name, mask in masks.items():
        rows = mask.flatten(1)
        assert (rows.all(1) == rows.any(1)).all() and rows.all(1).sum() == len(rows) // 2
        layer, gone = model.get_submodule(name), ~rows.any(1)
        assert (layer.weight[gone] == 0).all() and (layer.bias[gone] == 0).all() and (layer.bias_orig[gone] == 0).all()
    assert (model.conv(torch.randn(2, 3, 6, 6))[:, ~masks["conv"].flatten(1).any(1)] == 0).all()


def test_kernels_of_convolutions_go_whole_and_biases_stay():
    model = Net()
    pruner = Coarse(now(0.75), lambda _: 0.0, "kernel", generator=seeded()).prepare(model)
    assert pruner.layers.keys() == {"conv", "mix"}
    kernels = pruner.finish()["conv"].flatten(2)
    assert (kernels.all(2) == kernels.any(2)).all() and kernels.all(2).sum() == 6
    assert not prune.is_pruned(model.head) and model.conv.bias is model.conv._parameters["bias"]


def test_the_best_candidate_is_chosen_and_all_are_logged():
    places = set()
    for seed in range(4):
        model = Net()
        pruner = Coarse(now(0.5), kept_weight, exclude="head", candidates=7, generator=seeded(seed)).prepare(model)
        assert len(pruner.log) == 7 and len({row.seed for row in pruner.log}) == 7
        (chosen,) = (row for row in pruner.log if row.chosen)
        assert chosen.error == min(row.error for row in pruner.log) == kept_weight(model)
        assert all(row.step == 0 and row.sparsity == 0.5 for row in pruner.log)
        places.add(pruner.log.index(chosen))
    assert len(places) > 1
    tied = Coarse(now(0.5), lambda _: 1.0, candidates=3, generator=seeded()).prepare(Net())
    assert [row.chosen for row in tied.log] == [True, False, False]


def test_the_search_follows_the_schedule_and_nothing_returns():
    model = Net()
    schedule = CubicSchedule(0.0, 0.5, begin=1, end=5, frequency=2)
    pruner = Coarse(schedule, kept_weight, exclude="head", candidates=4, generator=seeded()).prepare(model)
    seen = [pruner.masks]
    for t in range(1, 7):
        pruner.step()
        seen.append(pruner.masks)
        for name, units in (("conv", 8), ("mix", 20)):
            kept = int(seen[-1][name].flatten(1).any(1).sum())
            assert kept == units - round(schedule.sparsity(t) * units)
    assert all((late[n] <= early[n]).all() for early, late in zip(seen, seen[1:], strict=False) for n in late)
    # At step 1 the schedule asks for nothing.
    assert [row.step for row in pruner.log] == [3] * 4 + [5] * 4


def test_masks_are_determined_by_the_generator_alone():
    def masks(seed, noise):
        torch.manual_seed(3)
        model = Net()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        found = Coarse(now(0.5), kept_weight, exclude="head", generator=seeded(seed)).prepare(model).finish()
        assert torch.equal(state, torch.get_rng_state())
        return found

    assert same(masks(0, 1), masks(0, 2)) and not same(masks(0, 1), masks(1, 1))


def test_it_starts_from_masks_that_exist():
    model = Net()
    prune.custom_from_mask(model.mix, "bias", torch.arange(20) > 0)
    maps = Coarse(now(0.5), kept_weight, exclude="head", generator=seeded()).prepare(model).finish()
    assert not model.mix.bias_mask[0]
    kernels = Coarse(now(0.75), kept_weight, "kernel", generator=seeded()).prepare(model).finish()
    weights = GradualMagnitude(now(0.9)).prepare(model).finish()
    for name in maps:
        assert (kernels[name] <= maps[name]).all() and (weights[name] <= kernels[name]).all()
        # Kernels of pruned maps count: three quarters are gone, not three quarters of what was left.
        assert kernels[name].sum() == maps[name].numel() // 4
    report = torch_csb.sparsify_(model)
    assert [row.name for row in report.converted] == ["mix", "head"]


def test_enough_pruned_already_asks_for_nothing():
    model = Net()
    first = GradualMagnitude(now(1.0), exclude="head").prepare(model).finish()
    pruner = Coarse(now(0.5), kept_weight, exclude="head").prepare(model)
    assert pruner.log == [] and same(pruner.finish(), first)


def test_eval_fn_sees_the_model_in_evaluation_mode_without_gradients():
    model, modes = Net(), []

    def look(model):
        modes.append((model.training, model.mix.training, torch.is_grad_enabled()))
        return 0.0

    model.train()
    model.mix.eval()
    Coarse(now(0.5), look, candidates=2).prepare(model)
    assert modes == [(False, False, False)] * 2
    assert model.training and model.conv.training and not model.mix.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "error"])
def test_a_failing_eval_fn_leaves_masks_modes_and_log_as_they_were(bad):
    model = Net()
    calls = []

    def fails(_):
        calls.append(0)
        return 0.5 if len(calls) < 3 else float(bad)

    pruner = Coarse(CubicSchedule.one_shot(0.5), fails, generator=seeded()).prepare(model)
    with pytest.raises(ValueError, match="eval_fn: expected a finite number|could not convert"):
        pruner.step()
    assert all(mask.all() for mask in pruner.masks.values()) and model.mix.bias_mask.all()
    assert model.training and pruner.log == []


def test_a_failure_in_prepare_leaves_a_model_without_masks_of_its_own():
    model = Net()
    prune.random_unstructured(model.mix, "weight", 0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weight, earlier = model.conv.weight, model.mix.weight_mask.bool().clone()
    pruner = Coarse(now(0.75), lambda _: float("nan"), generator=seeded())
    for _ in range(2):
        with pytest.raises(ValueError, match="eval_fn"):
            pruner.prepare(model)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
        assert model.conv.weight is weight and torch.equal(model.mix.weight_mask.bool(), earlier)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"units": "row"}, "units: expected 'feature_map' or 'kernel'"), ({"candidates": 0}, "candidates: expected at")],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Coarse(now(0.5), kept_weight, **arguments)


def test_kernels_need_a_convolution():
    with pytest.raises(ValueError, match="expected an nn.Linear or nn.Conv2d to prune, got none"):
        Coarse(now(0.5), kept_weight, "kernel").prepare(nn.Sequential(nn.Linear(3, 3)))


def test_momentum_and_decay_move_nothing_that_is_pruned():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def train():
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()

    train()
    pruner = Coarse(CubicSchedule.one_shot(0.5, at=2), kept_weight, exclude="head", generator=seeded())
    pruner.prepare(model, optimizer)
    for _ in range(3):
        train()
        pruner.step()
    masks = pruner.finish()
    optimizer.step()  # with the gradient of the step before
    train()
    for name, mask in masks.items():
        layer, gone = model.get_submodule(name), ~mask.flatten(1).any(1)
        assert (layer.weight_orig[gone] == 0).all() and (layer.bias_orig[gone] == 0).all()
        assert layer.bias_orig[~gone].count_nonzero() == (~gone).sum()
