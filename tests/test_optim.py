from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import torch_csb
from torch_csb import CSBLinear, migrate_optimizer_, param_groups, sparsify_
from torch_csb.nn._layer import CSBLayer


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, tensor):
        return tensor * self.mask


STEPS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), weight_decay=0.1, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def dense_model(device="cpu", dtype=torch.float64):
    model = nn.Sequential(nn.Conv2d(24, 40, 1), nn.ReLU(), nn.Flatten(), nn.Linear(360, 30), nn.Linear(30, 20))
    return model.to(device, dtype)


def masked_model(device="cpu", dtype=torch.float64):
    return masked(dense_model(device, dtype))


def masked(model):
    for layer in (model[0], model[3]):
        prune.random_unstructured(layer, "weight", 0.9)
    return model


def data(device="cpu", dtype=torch.float64, steps=3):
    return torch.randn(steps, 6, 24, 3, 3, device=device, dtype=dtype)


def train(model, optimizer, batches, scheduler=None):
    for x in batches:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(model):
    """The weight that each layer computes with."""
    dense = copy.deepcopy(model)
    torch_csb.densify_(dense, progress=False)
    return [dense[i].weight.detach() for i in (0, 3, 4)]


def masked_weights(model):
    for i in (0, 3):
        model[i].weight = model[i].weight_orig * model[i].weight_mask
    return [model[i].weight.detach() for i in (0, 3, 4)]


def moments(optimizer):
    state = {}
    for p, slots in optimizer.state.items():
        state[id(p)] = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in slots.items()}
    return state


def assert_same_state(optimizer, before):
    after = moments(optimizer)
    assert after.keys() == before.keys()
    for i, slots in before.items():
        assert after[i].keys() == slots.keys()
        for key, value in slots.items():
            same = torch.equal(after[i][key], value) if isinstance(value, torch.Tensor) else after[i][key] == value
            assert same, key


@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_training_goes_on_as_the_masked_dense_model_would(device, make):
    model, before, after = masked_model(device), data(device), data(device)
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    train(model, optimizer, before, scheduler)

    with torch.no_grad():  # deepcopy takes no product that still has a graph
        model(before[0])
    reference = copy.deepcopy(model)
    others = make(reference.parameters())
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_scheduler = torch.optim.lr_scheduler.StepLR(others, 2, 0.5)
    other_scheduler.load_state_dict(scheduler.state_dict())

    groups = optimizer.param_groups
    sparsify_(model)
    assert migrate_optimizer_(optimizer, model) == ["0.values", "3.values"]
    assert optimizer.param_groups is groups and scheduler.optimizer is optimizer
    untouched = weights(model)
    train(model, optimizer, after, scheduler)
    train(reference, others, after, other_scheduler)
    assert optimizer.param_groups[0]["lr"] == others.param_groups[0]["lr"]
    for got, expected, start in zip(weights(model), masked_weights(reference), untouched, strict=True):
        torch.testing.assert_close(got, expected)
        assert (got - start).abs().max() > 1e-3, "steps too small to tell moments apart"


def test_moments_are_those_of_the_entries_and_zero_at_padding(device):
    model = masked_model(device)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, data(device))
    old = {i: dict(optimizer.state[model[i].weight_orig]) for i in (0, 3)}
    sparsify_(model)
    migrate_optimizer_(optimizer, model)
    for i in (0, 3):
        layer, new = model[i], optimizer.state[model[i].values]
        assert list(new) == list(old[i]) and torch.equal(new["step"], old[i]["step"])
        kept = layer.matrix.with_values(torch.ones_like(layer.values)).to_dense().bool()
        for key in ("exp_avg", "exp_avg_sq"):
            assert new[key].shape == layer.values.shape and not new[key][~layer.matrix.is_entry].any()
            dense = layer.matrix.with_values(new[key]).to_dense()
            assert torch.equal(dense, old[i][key].flatten(1) * kept) and dense.any()


def test_groups_keep_order_options_and_names():
    model = masked_model()
    named = dict(model.named_parameters())
    first, second = ["4.weight", "3.weight_orig", "0.bias"], ["0.weight_orig", "3.bias", "4.bias"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [(name, named[name]) for name in first], "lr": 0.5, "weight_decay": 0.0},
            {"params": [(name, named[name]) for name in second], "betas": (0.5, 0.6)},
        ]
    )
    options = [{key: v for key, v in g.items() if key not in ("params", "param_names")} for g in optimizer.param_groups]
    sparsify_(model)
    migrate_optimizer_(optimizer, model)
    one, two = optimizer.param_groups
    assert list(map(id, one["params"])) == list(map(id, (model[4].weight, model[3].values, model[0].bias)))
    assert list(map(id, two["params"])) == list(map(id, (model[0].values, model[3].bias, model[4].bias)))
    assert one["param_names"] == ["4.weight", "3.values", "0.bias"]
    assert two["param_names"] == ["0.values", "3.bias", "4.bias"]
    for group, option in zip(optimizer.param_groups, options, strict=True):
        assert {key: group[key] for key in option} == option


def test_a_parametrized_mask_migrates_too(device):
    model = dense_model(device)
    named = torch.optim.AdamW(list(model.named_parameters()))
    mask = torch.rand_like(model[3].weight) > 0.9
    parametrize.register_parametrization(model[3], "weight", Mask(mask))
    parametrize.register_parametrization(model[3], "bias", Mask(torch.ones_like(model[3].bias)))
    train(model, named, data(device))
    original = model[3].parametrizations.weight.original
    moment = named.state[original]["exp_avg"].clone()
    sparsify_(model)
    assert migrate_optimizer_(named, model) == ["3.values"]
    group = named.param_groups[0]
    assert ids(group) == [id(p) for p in model.parameters()]
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    layer = model[3]
    stored = named.state[layer.values]["exp_avg"]
    assert torch.equal(layer.matrix.with_values(stored).to_dense(), moment * mask)


def test_the_dense_weights_are_let_go():
    model = masked_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, data())
    alive = [weakref.ref(model[i].weight_orig) for i in (0, 3)]
    alive += [weakref.ref(optimizer.state[ref()]["exp_avg"]) for ref in alive]
    sparsify_(model)
    gc.collect()
    assert all(ref() is not None for ref in alive), "the optimizer still holds them"
    migrate_optimizer_(optimizer, model)
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_a_second_call_changes_nothing_and_the_state_survives_a_checkpoint():
    model = dense_model()
    # Made before nn.utils.prune, which puts a weight behind its bias: an optimizer's state is loaded by order.
    optimizer = torch.optim.Adam(model.parameters())
    train(masked(model), optimizer, data())
    sparsify_(model)
    assert migrate_optimizer_(optimizer, model)
    before = moments(optimizer)
    assert migrate_optimizer_(optimizer, model) == []
    assert_same_state(optimizer, before)
    twin = copy.deepcopy(model)
    resumed = torch.optim.Adam(twin.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    batches = data()
    train(model, optimizer, batches)
    train(twin, resumed, batches)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(twin), strict=True))


def test_an_optimizer_that_has_not_stepped_and_one_that_trains_a_part_migrate():
    model = masked_model()
    optimizer = torch.optim.AdamW([model[3].weight_orig])
    sparsify_(model)
    assert migrate_optimizer_(optimizer, model) == ["3.values"]
    assert len(optimizer.state) == 0 and optimizer.param_groups[0]["params"][0] is model[3].values
    train(model, optimizer, data())


def test_a_layer_made_by_from_dense_takes_weight_and_bias():
    dense = nn.Linear(40, 30)
    dense.weight.data *= torch.rand(30, 40) > 0.8
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    dense(torch.randn(4, 40)).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[dense.bias]["momentum_buffer"].clone()
    layer = CSBLinear.from_dense(dense)
    assert migrate_optimizer_(optimizer, layer) == ["values", "bias"]
    assert torch.equal(optimizer.state[layer.bias]["momentum_buffer"], momentum)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(layer.values), id(layer.bias)]


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_state_that_is_not_one_number_an_element_is_refused_and_nothing_changes(make):
    model = masked_model(dtype=torch.float32)
    optimizer = make(model.parameters())
    for x in data(dtype=torch.float32):

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    parameters = [id(p) for p in optimizer.param_groups[0]["params"]]
    sparsify_(model)
    with pytest.raises(ValueError, match="make a new"):
        migrate_optimizer_(optimizer, model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == parameters


def test_a_copied_model_is_told_that_its_origin_is_lost():
    model = masked_model()
    optimizer = torch.optim.AdamW(model.parameters())
    sparsify_(model)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=r"\(40, 24, 1, 1\) of 0, and not 0.values.*before the model is copied"):
        migrate_optimizer_(optimizer, copy.deepcopy(model))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before


def test_wrong_arguments_are_refused():
    model = masked_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="expected CSB layers, got none; call sparsify_ first"):
        migrate_optimizer_(optimizer, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer, got StepLR"):
        migrate_optimizer_(scheduler, model)
    sparsify_(model)
    optimizer.add_param_group({"params": [model[0].values]})
    with pytest.raises(ValueError, match="it holds both 0.values and the dense Parameter"):
        migrate_optimizer_(optimizer, model)


def test_two_layers_made_from_one_weight_are_refused():
    dense = nn.Linear(40, 30)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    twins = nn.ModuleList([CSBLinear.from_dense(dense), CSBLinear.from_dense(dense)])
    with pytest.raises(ValueError, match="0.values and 1.values were made from one Parameter"):
        migrate_optimizer_(optimizer, twins)


def by_dimension(model, weight_decay):
    """The rule of timm and of many training scripts."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def ids(group):
    return [id(p) for p in group["params"]]


def test_param_groups_are_the_usual_ones_of_a_dense_model():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False))
    ours, usual = param_groups(model, 0.05), by_dimension(model, 0.05)
    assert [ids(g) for g in ours] == [ids(g) for g in usual]
    assert [g["weight_decay"] for g in ours] == [0.05, 0.0]


def test_values_keep_their_decay_and_biases_get_none(device):
    model = masked_model(device)
    sparsify_(model)
    decay, rest = param_groups(model, 0.1)
    assert ids(decay) == [id(model[0].values), id(model[3].values), id(model[4].weight)]
    assert ids(rest) == [id(model[i].bias) for i in (0, 3, 4)]
    assert id(model[3].values) in ids(by_dimension(model, 0.1)[1]), "what param_groups is there to prevent"
    before = model[3].values.detach().clone()
    bias = model[3].bias.detach().clone()
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[3].values, before * (1 - 0.5 * 0.1))
    assert torch.equal(model[3].bias, bias)


def test_frozen_shared_and_spared_parameters():
    model = masked_model()
    sparsify_(model)
    model[0].values.requires_grad_(False)
    shared = nn.ModuleList([model, model[3]])
    decay, rest = param_groups(shared, 0.1)
    assert ids(decay) == [id(model[3].values), id(model[4].weight)] and len(rest["params"]) == 3
    decay, rest = param_groups(model, 0.1, no_decay=["*.values", "4.weight"])
    assert not decay["params"] and len(rest["params"]) == 5
    assert len(param_groups(model, 0.1, no_decay="4.*")[0]["params"]) == 1
    with pytest.raises(ValueError, match="no_decay: the model has no Parameter '4.wieght'"):
        param_groups(model, 0.1, no_decay="4.wieght")
    with pytest.raises(ValueError, match="weight_decay: expected a number from 0 on, got -1"):
        param_groups(model, -1)


def test_the_report_says_so_where_something_was_converted():
    model = masked_model()
    assert any("torch_csb.param_groups(model, weight_decay)" in note for note in sparsify_(model).notes)
    with pytest.warns(UserWarning, match="none"):
        assert not sparsify_(nn.Sequential(nn.Linear(64, 64))).notes
    assert all(isinstance(model[i], CSBLayer) for i in (0, 3))
