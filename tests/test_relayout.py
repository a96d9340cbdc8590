from __future__ import annotations

import copy

import pytest
import torch
from cases import packing
from torch import nn

from torch_csb import CSBLinear, CSBMatrix, relayout_, sparsify_
from torch_csb.prune import share_

SHAPES = {"ragged": (50, 70), "one block": (16, 16), "no rows": (0, 5), "one entry": (300, 300), "one row": (1, 700)}


def sparse_model(device="cpu", dtype=torch.float64, target="cuda"):
    model = nn.Sequential(nn.Linear(300, 150), nn.ReLU(), nn.Linear(150, 140, bias=False), nn.Linear(140, 20))
    for layer in (model[0], model[2]):
        layer.weight.data *= torch.rand_like(layer.weight) > 0.9
    model = model.to(device, dtype)
    sparsify_(model, target=target)
    return model


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def dense_values(layer, stored):
    return layer.matrix.with_values(stored).to_dense()


def snapshot(model):
    tensors = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    grads = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return tensors | grads


def assert_same_bits(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "source, target",
    [(64, 256), (256, 64), (16, 32), (8, 64), (64, 4), (64, "bitmap"), ("bitmap", 64), (16, "bitmap"), ("bitmap", 256)],
)
def test_every_entry_is_where_packing_anew_puts_it(device, shape, source, target):
    weight = torch.randn(shape) * (torch.rand(shape) > 0.8)
    if shape == SHAPES["one entry"]:
        weight = torch.zeros(shape).index_put((torch.tensor([299]), torch.tensor([298])), torch.tensor(3.0))
    weight = weight.to(device)
    layer = CSBLinear(CSBMatrix.from_dense(weight, **packing(source)))
    values = layer.values
    assert relayout_(layer, **packing(target)) == [""]
    fresh = CSBMatrix.from_dense(weight, **packing(target))
    assert layer.values is values and layer.matrix.layout == fresh.layout
    for name in ("values", "codes", "blk_ptr", "blk_pad", "units"):
        assert torch.equal(getattr(layer.matrix, name).detach(), getattr(fresh, name)), name
    assert torch.equal(layer.layout, fresh.layout.to_tensor(device))
    layer.matrix.validate()
    assert relayout_(layer, **packing(target)) == []


def test_zeros_that_are_entries_stay_entries():
    mask = torch.rand(50, 70) > 0.8
    layer = CSBLinear(CSBMatrix.from_dense(torch.zeros(50, 70), mask, block_size=16))
    relayout_(layer, block_size=64)
    assert layer.nnz == mask.sum()
    assert torch.equal(layer.codes, CSBMatrix.from_dense(torch.zeros(50, 70), mask, block_size=64).codes)


def test_the_encoding_follows_each_layers_density():
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(2))).bfloat16()
    for layer, density in zip(model, (0.5, 0.05), strict=True):
        layer.weight.data *= torch.rand(100, 100) < density
    sparsify_(model, target="cpu", min_sparsity=0)
    before = [layer.matrix.to_dense() for layer in model]
    assert relayout_(model, target="cuda") == ["0", "1"]
    assert [layer.matrix.layout.encoding for layer in model] == ["bitmap", "codes"]
    assert all(torch.equal(layer.matrix.to_dense(), dense) for layer, dense in zip(model, before, strict=True))
    assert relayout_(model, target="cuda", encoding="codes") == ["0"]
    with pytest.raises(ValueError, match="encoding: expected None or one of codes, bitmap, got 'bits'"):
        relayout_(model, encoding="bits")


@pytest.mark.parametrize("options", [{"target": "cpu"}, {"encoding": "bitmap"}], ids=["larger blocks", "bitmaps"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)])
def test_values_gradients_and_moments_move_together(device, make, options):
    model = sparse_model(device)
    optimizer = make(model.parameters())
    batches = torch.randn(3, 8, 300, device=device, dtype=torch.float64)
    train(model, optimizer, batches)
    expected = []
    for layer in (model[0], model[2]):
        slots = {key: v for key, v in optimizer.state[layer.values].items() if v.shape == layer.values.shape}
        stored = {"values": layer.values.detach(), "grad": layer.values.grad, **slots}
        expected.append({name: dense_values(layer, tensor) for name, tensor in stored.items()})
    assert relayout_(model, optimizer, **options) == ["0", "2"]
    for layer, dense in zip((model[0], model[2]), expected, strict=True):
        slots = optimizer.state[layer.values]
        found = {"values": layer.values.detach(), "grad": layer.values.grad} | {
            k: slots[k] for k in dense if k in slots
        }
        assert found.keys() == dense.keys() and len(found) > 2
        for name, tensor in found.items():
            assert tensor.shape == layer.values.shape and torch.equal(dense_values(layer, tensor), dense[name]), name
            assert not tensor[~layer.matrix.is_entry].any() and dense[name].any()


def test_training_goes_on_as_in_the_old_layout(device):
    model = sparse_model(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    batches = torch.randn(4, 8, 300, device=device, dtype=torch.float64)
    train(model, optimizer, batches[:2])
    scheduler.step()
    twin = copy.deepcopy(model)
    others = torch.optim.AdamW(twin.parameters())
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    relayout_(model, optimizer, target="cpu")
    before = model[0].to_dense().weight.detach()
    train(model, optimizer, batches[2:])
    train(twin, others, batches[2:])
    assert model[0].block_size == 256 and twin[0].block_size == 64
    assert not torch.equal(model[0].to_dense().weight, before)
    for one, other in zip(dense_weights(model), dense_weights(twin), strict=True):
        torch.testing.assert_close(one, other)


def dense_weights(model):
    return [model[0].to_dense().weight, model[2].to_dense().weight, model[3].weight]


def test_a_model_with_gradients_needs_its_optimizer():
    model = sparse_model()
    model(torch.randn(2, 300, dtype=torch.float64)).sum().backward()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0.values: it has a gradient.*pass optimizer="):
        relayout_(model, target="cpu")
    assert_same_bits(model, before)
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected the one that trains the model's values"):
        relayout_(model, stranger, target="cpu")
    assert_same_bits(model, before)
    model.zero_grad()
    assert relayout_(model, target="cpu") == ["0", "2"]


def test_an_error_in_the_last_layer_changes_nothing_in_the_first():
    model = sparse_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, torch.randn(1, 8, 300, dtype=torch.float64))
    optimizer.state[model[2].values]["rows"] = torch.zeros(7)
    before = snapshot(model)
    moment = optimizer.state[model[0].values]["exp_avg"]
    with pytest.raises(ValueError, match=r"the state 'rows' of 2.values in AdamW has shape \(7,\)"):
        relayout_(model, optimizer, target="cpu")
    assert_same_bits(model, before)
    assert optimizer.state[model[0].values]["exp_avg"] is moment and model[0].block_size == 64


def test_what_knows_the_old_order_is_refused():
    model = sparse_model()
    sharing = share_(model)
    with pytest.raises(ValueError, match="0.values: it has gradient hooks"):
        relayout_(model, target="cpu")
    sharing.finish()
    model[0].values.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="0.values: it has gradient hooks"):
        relayout_(model, target="cpu")
    shared = sparse_model()[0]
    twin = copy.deepcopy(shared)
    twin.values = shared.values
    with pytest.raises(ValueError, match="1.values: expected values of its own, they are those of 0 too"):
        relayout_(nn.Sequential(shared, twin), target="cpu")
    with pytest.raises(ValueError, match="values: expected data, it is on the meta device"):
        relayout_(sparse_model()[0].to("meta"), target="cpu")
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer, got list"):
        relayout_(model, [], target="cpu")
    with pytest.raises(ValueError, match="target: expected one of"):
        relayout_(model, target="tpu")


@pytest.mark.parametrize("change", ["relayout", "load"])
def test_a_backward_through_an_earlier_forward_raises(change):
    model = sparse_model()
    x = torch.randn(2, 300, dtype=torch.float64, requires_grad=True)
    loss = model(x).sum()
    if change == "relayout":
        relayout_(model, target="cpu")
    else:
        model.load_state_dict(sparse_model(target="cpu").state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(x).sum().backward()
    assert model[0].values.grad.shape == model[0].values.shape


def test_a_checkpoint_after_relayout_loads():
    model = sparse_model()
    x = torch.randn(2, 300, dtype=torch.float64)
    relayout_(model, target="cpu")
    loaded = sparse_model()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x)) and loaded[0].block_size == 256
