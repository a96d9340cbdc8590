from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import parametrizations, parametrize, prune

from torch_csb import CSBConv2d, CSBLinear, densify_, load_into, save, sparsify_


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


class Inverted(nn.Module):
    """True is pruned, as in masked_fill."""

    def __init__(self, pruned):
        super().__init__()
        self.register_buffer("pruned", pruned)

    def forward(self, weight):
        return weight.masked_fill(self.pruned, 0)


class Triangular(nn.Module):
    def forward(self, weight):
        return weight.tril(-30)


class Scale(nn.Module):
    def forward(self, weight):
        return 2 * weight


class TopHalf(nn.Module):
    def forward(self, weight):
        return weight * (weight.abs() > weight.abs().median())


class Square(nn.Module):
    """Makes ones of ones, and is no mask."""

    def forward(self, weight):
        return weight.square()


def dense_net(dtype=torch.float64, device="cpu"):
    return nn.Sequential(nn.Linear(70, 64), nn.ReLU(), nn.Linear(64, 50), nn.Linear(50, 3)).to(device, dtype)


def random_masks(net):
    return {i: torch.rand_like(net[i].weight) > 0.9 for i in (0, 2)}


def by_prune(net, masks):
    for i, mask in masks.items():
        prune.custom_from_mask(net[i], "weight", mask)


def by_parametrize(net, masks):
    for i, mask in masks.items():
        parametrize.register_parametrization(net[i], "weight", Mask(mask.to(net[i].weight.dtype)))


def by_bool_parametrize(net, masks):
    for i, mask in masks.items():
        parametrize.register_parametrization(net[i], "weight", Mask(mask))


def by_two_masks(net, masks):
    for i, mask in masks.items():
        other = torch.rand(mask.shape, device=mask.device) > 0.5
        parametrize.register_parametrization(net[i], "weight", Mask(mask | other))
        parametrize.register_parametrization(net[i], "weight", Mask(mask | ~other))


def by_ao(net, masks):
    """torch.ao.pruning's parametrization, with masks set as its sparsifiers set them."""
    sparsifier = WeightNormSparsifier(sparsity_level=0.9)
    sparsifier.prepare(net, [{"tensor_fqn": f"{i}.weight"} for i in masks])
    for i, mask in masks.items():
        net[i].parametrizations.weight[0].mask.copy_(mask)
    return sparsifier


WAYS = {
    "prune": by_prune,
    "parametrize": by_parametrize,
    "bool": by_bool_parametrize,
    "two masks": by_two_masks,
    "ao": by_ao,
}


def names(report):
    return [row.name for row in report.converted]


def reasons(report):
    return {row.name: row.reason for row in report.kept}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_mask_is_resolved_and_nothing_of_it_is_left(device, way):
    net = dense_net(device=device)
    masks = random_masks(net)
    with torch.no_grad():  # A zero inside the mask stays an entry.
        net[0].weight[masks[0].nonzero()[0].unbind()] = 0
    way(net, masks)
    seen = []
    handle = net[0].register_forward_hook(lambda *_: seen.append("after"))
    bias = net[0].bias
    x = torch.randn(4, 70, dtype=torch.float64, device=device)
    expected = net(x)
    dry = sparsify_(net, dry_run=True)
    report = sparsify_(net)
    assert dry == report and names(report) == ["0", "2"]
    assert [(row.kind, row.sparsity) for row in report.converted] == [
        ("Linear", 1 - int(masks[i].sum()) / masks[i].numel()) for i in (0, 2)
    ]
    seen.clear()
    torch.testing.assert_close(net(x), expected)
    assert seen == ["after"] and net[0].bias is bias
    for i in (0, 2):
        assert type(net[i]) is CSBLinear and net[i].nnz == masks[i].sum()
        assert not parametrize.is_parametrized(net[i]) and not prune.is_pruned(net[i])
        assert not net[i]._modules and not net[i]._forward_pre_hooks
        assert set(net[i].state_dict()) == {"values", "codes", "blk_ptr", "blk_pad", "layout", "bias"}
    handle.remove()
    densify_(net)
    assert type(net[0]) is nn.Linear and torch.equal(net[0].weight == 0, ~masks[0] | (net[0].weight == 0))
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("target", ["same pattern", "other pattern", "load_into"])
def test_the_state_dict_of_each_loads_into_a_csb_model(device, way, target, tmp_path):
    net = dense_net(device=device)
    masks = random_masks(net)
    other = dense_net(device=device)
    by_prune(other, masks if target == "same pattern" else random_masks(other))
    sparsify_(other)
    sparsifier = way(net, masks)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    if sparsifier is not None:
        for name, kept in sparsifier.state_dict()["state"].items():
            layer = name.removesuffix(".weight")
            state[f"{layer}.parametrizations.weight.0.mask"] = kept["mask"]
    if target == "load_into":
        from safetensors.torch import save_file

        save_file(state, tmp_path / "masked.safetensors")
        assert load_into(other, tmp_path / "masked.safetensors") == ([], [])
    else:
        assert other.load_state_dict(state) == ([], [])
    for i in (0, 2):
        assert other[i].nnz == masks[i].sum()
    x = torch.randn(4, 70, dtype=torch.float64, device=device)
    torch.testing.assert_close(other(x), net(x))


def test_the_masked_model_takes_a_file_of_csb_layers(device, tmp_path):
    net = dense_net(device=device)
    by_parametrize(net, random_masks(net))
    twin = copy.deepcopy(net)
    sparsify_(net)
    save(net, tmp_path / "net.safetensors")
    with torch.no_grad():
        twin[0].parametrizations.weight.original.zero_()
    assert load_into(twin, tmp_path / "net.safetensors") == ([], [])
    x = torch.randn(4, 70, dtype=torch.float64, device=device)
    assert type(twin[0]) is CSBLinear and torch.equal(twin(x), net(x))


@pytest.mark.parametrize("inplace", [True, False])
def test_convert_of_torch_ao_makes_csb_layers(device, inplace):
    net = dense_net(device=device)
    # Single weights, where the default would be blocks of 1 x 4.
    sparsifier = WeightNormSparsifier(sparsity_level=0.9, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(net, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    calls = []
    net[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    net[0].register_forward_hook(lambda *_, **__: calls.append("post"), with_kwargs=True)
    x = torch.randn(4, 70, dtype=torch.float64, device=device)
    expected, once = net(x), list(calls)
    assert once == ["pre", "post"]
    csb = sparsifier.convert(net, mapping={nn.Linear: CSBLinear}, inplace=inplace)
    assert (csb is net) == inplace and [type(layer) for layer in csb][::3] == [CSBLinear, nn.Linear]
    calls.clear()
    torch.testing.assert_close(csb(x), expected)
    assert calls == once, "each hook runs once"
    assert csb[0].sparsity == pytest.approx(0.9, abs=0.01)
    assert not parametrize.is_parametrized(csb[0]) and csb[0].values.device.type == device
    csb(x).sum().backward()
    assert csb[0].values.grad.abs().sum() > 0


def test_a_hook_of_from_dense_that_is_registered_again_can_be_removed_and_later_ones_are_new():
    dense, calls = nn.Linear(4, 4), []

    def hook(module, args, kwargs, output):
        calls.append(len(kwargs))

    dense.register_forward_hook(hook, with_kwargs=True, always_call=True)
    layer = CSBLinear.from_dense(dense)
    first, second = (layer.register_forward_hook(hook, with_kwargs=True) for _ in range(2))
    layer(torch.randn(1, 4))
    assert calls == [0, 0]
    first.remove()
    assert first.id not in layer._forward_hooks_with_kwargs and first.id not in layer._forward_hooks_always_called
    layer(torch.randn(1, 4))
    assert calls == [0, 0, 0]
    second.remove()
    assert not layer._forward_hooks
    twin = copy.deepcopy(CSBLinear.from_dense(dense))
    twin.register_forward_hook(hook, with_kwargs=True)
    assert len(twin._forward_hooks) == 2, "a copy doesn't remember"


def test_after_squash_mask_the_zeros_are_plain(device):
    net = dense_net(device=device)
    sparsifier = WeightNormSparsifier(sparsity_level=0.9, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(net, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    x = torch.randn(4, 70, dtype=torch.float64, device=device)
    expected = net(x)
    sparsifier.squash_mask(params_to_keep=("sparsity_level",))
    assert names(sparsify_(net)) == ["0"] and net[0].sparse_params == {"sparsity_level": 0.9}
    torch.testing.assert_close(net(x), expected)


def test_torch_ao_state_without_its_masks_is_refused():
    net = dense_net()
    masks = random_masks(net)
    csb = copy.deepcopy(net)
    by_prune(csb, masks)
    sparsify_(csb)
    by_ao(net, masks)
    assert "0.parametrizations.weight.original" in net.state_dict()
    with pytest.raises(RuntimeError, match=r"came without 0.parametrizations.weight.0.mask.*call squash_mask\(\)"):
        csb.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    "step, converts",
    [
        (lambda w: Mask((torch.rand_like(w) > 0.9).to(w.dtype)), True),
        (lambda w: Inverted(torch.rand_like(w) < 0.9), True),
        (lambda w: Triangular(), True),
        (lambda w: nn.Identity(), True),
        (lambda w: Scale(), False),
        (lambda w: TopHalf(), False),
        (lambda w: Square(), False),
        (lambda w: nn.Dropout(0.9), False),
        (lambda w: Mask(torch.full_like(w, 0.5)), False),
        (lambda w: Mask(-torch.ones_like(w)), False),
    ],
    ids=["mask", "inverted", "triangular", "identity", "scale", "top half", "square", "dropout", "half", "minus one"],
)
def test_what_multiplies_by_zeros_and_ones_is_a_mask_and_nothing_else(step, converts):
    net = dense_net()
    net[2].weight.data *= torch.rand_like(net[2].weight) > 0.9
    parametrize.register_parametrization(net[0], "weight", step(net[0].weight))
    x = torch.randn(4, 70, dtype=torch.float64)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    report = sparsify_(net, min_sparsity=0.0, exclude="3", dry_run=True)
    assert ("0" in names(report)) == converts
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    if not converts:
        assert reasons(report)["0"].startswith("parametrized: ")
        assert "more to its weight than a fixed mask" in reasons(report)["0"]
        with pytest.raises(ValueError, match="parametrized"):
            CSBLinear.from_dense(net[0])
        return
    expected = net(x)
    sparsify_(net, min_sparsity=0.0, exclude="3")
    torch.testing.assert_close(net(x), expected)


def test_trained_and_normalizing_parametrizations_are_kept_and_not_even_called():
    net = dense_net()
    parametrizations.spectral_norm(net[0])
    parametrizations.weight_norm(net[2])
    parametrizations.orthogonal(net[3])
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.warns(UserWarning, match="3 parametrized"):
        report = sparsify_(net)
    assert reasons(report)["0"] == "parametrized: _SpectralNorm computes its weight from other tensors"
    assert reasons(report)["2"] == "parametrized: its weight is computed from other tensors"
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())


def test_a_mask_on_the_bias_is_resolved_and_anything_else_there_is_refused_before_a_change():
    net = dense_net()
    by_parametrize(net, random_masks(net))
    kept = torch.rand(64) > 0.5
    parametrize.register_parametrization(net[0], "bias", Mask(kept))
    bias = net[0].parametrizations.bias.original
    x = torch.randn(4, 70, dtype=torch.float64)
    expected, state = net(x), copy.deepcopy(net.state_dict())
    csb = copy.deepcopy(net)
    sparsify_(csb)
    torch.testing.assert_close(csb(x), expected)
    assert torch.equal(csb[0].bias != 0, kept)
    csb[0].bias.data.fill_(7)
    csb.load_state_dict(state)
    torch.testing.assert_close(csb(x), expected)
    sparsify_(net, exclude="2")
    assert net[0].bias is bias

    parametrize.register_parametrization(net[2], "bias", Scale())
    with pytest.warns(UserWarning, match="1 parametrized"):
        report = sparsify_(net)
    assert reasons(report)["2"] == "parametrized: Scale does more to its bias than a fixed mask of zeros and ones"


def test_a_weight_of_zeros_hides_no_scale():
    layer = nn.Linear(8, 8)
    layer.weight.data.zero_()
    parametrize.register_parametrization(layer, "weight", Scale())
    with pytest.raises(ValueError, match="parametrized: Scale does more"):
        CSBLinear.from_dense(layer)


def test_a_mask_that_changes_the_dtype_is_no_mask():
    layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    parametrize.register_parametrization(layer, "weight", Mask(torch.ones(64, 64)), unsafe=True)
    with pytest.raises(ValueError, match="parametrized: Mask does more"):
        CSBLinear.from_dense(layer)


def test_weights_that_are_not_finite_outside_the_mask_are_pruned_and_inside_are_entries():
    layer = nn.Linear(8, 8)
    mask = torch.zeros(8, 8)
    mask[0, :2] = 1
    layer.weight.data[0, 0] = torch.nan
    layer.weight.data[5, 5] = torch.nan
    layer.weight.data[6, 6] = torch.inf
    parametrize.register_parametrization(layer, "weight", Mask(mask))
    csb = CSBLinear.from_dense(layer)
    assert csb.nnz == 2 and csb.values.isnan().sum() == 1


def test_a_parametrized_convolution_converts():
    conv = nn.Conv2d(40, 30, 1).double()
    parametrize.register_parametrization(conv, "weight", Mask(torch.rand(30, 40, 1, 1) > 0.9))
    net = nn.Sequential(conv)
    x = torch.randn(2, 40, 3, 3, dtype=torch.float64)
    expected = net(x)
    assert names(sparsify_(net)) == ["0"] and type(net[0]) is CSBConv2d
    torch.testing.assert_close(net(x), expected)


BROKEN = {
    "scaled": (lambda s: s["parametrizations.weight.0.mask"].mul_(0.5), "weight.0.mask: expected zeros and ones"),
    "shape": (
        lambda s: s.update({"parametrizations.weight.0.mask": torch.ones(3)}),
        r"weight.0.mask: expected shape \(50, 64\), got \(3,\)",
    ),
    "original": (
        lambda s: s.update({"parametrizations.weight.original": torch.ones(3)}),
        r"weight.original: expected shape \(50, 64\), got \(3,\)",
    ),
    "other": (
        lambda s: s.update({"parametrizations.weight.1.scale": torch.ones(1)}),
        "weight.1.scale: expected nothing but masks",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_masked_state_that_is_not_understood_is_refused_by_name(damage):
    break_it, message = BROKEN[damage]
    net = dense_net()
    masks = random_masks(net)
    csb = copy.deepcopy(net)
    by_prune(csb, masks)
    sparsify_(csb)
    by_parametrize(net, masks)
    state = copy.deepcopy(net[2].state_dict())
    break_it(state)
    before = copy.deepcopy(csb[2].state_dict())
    with pytest.raises(RuntimeError, match=message):
        csb[2].load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in csb[2].state_dict().items())


def test_a_bare_parametrized_layer_is_refused_with_its_name():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Mask(torch.ones(8, 8)))
    with warnings.catch_warnings(), pytest.raises(TypeError, match="model: an nn.Linear can't be replaced in place"):
        sparsify_(layer)


@pytest.mark.parametrize("way", [by_prune, by_parametrize, by_two_masks])
def test_a_layer_that_stayed_dense_and_masked_loads_into_one_without_a_mask(way, tmp_path):
    net, fresh = dense_net(), dense_net()
    way(net, random_masks(net))
    sparsify_(net, exclude="2")
    save(net, tmp_path / "net.safetensors")
    x = torch.randn(4, 70, dtype=torch.float64)
    assert load_into(fresh, tmp_path / "net.safetensors") == ([], [])
    assert type(fresh[0]) is CSBLinear and type(fresh[2]) is nn.Linear
    with torch.no_grad():  # deepcopy takes no product that still has a graph
        torch.testing.assert_close(fresh(x), net(x))
    twin = copy.deepcopy(net)  # With the same mask in place the original is loaded.
    twin[2].load_state_dict({key: torch.zeros_like(tensor) for key, tensor in net[2].state_dict().items()})
    load_into(twin, tmp_path / "net.safetensors")
    assert torch.equal(twin(x), net(x))


def test_a_mask_of_another_shape_is_refused_by_name(tmp_path):
    net, fresh = dense_net(), dense_net()
    by_prune(net, random_masks(net))
    net[2].weight_mask = torch.ones(3)
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in net.state_dict().items()}, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"2.weight_mask: expected shape \(50, 64\), got \(3,\)"):
        load_into(fresh, tmp_path / "net.safetensors")
