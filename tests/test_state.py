from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import packing
from torch import nn
from torch.nn.utils import prune

from torch_csb import CSBConv2d, CSBLinear, CSBMatrix

ARRAYS = ["values", "codes", "blk_ptr", "blk_pad", "layout"]


def dense_layer(sparsity=0.9, dtype=torch.float32, bias=True):
    layer = nn.Linear(70, 50, bias=bias, dtype=dtype)
    layer.weight.data *= torch.rand(50, 70) >= sparsity
    return layer


def csb_layer(sparsity=0.9, dtype=torch.float32, block_size=16, bias=True):
    return CSBLinear.from_dense(dense_layer(sparsity, dtype, bias), **packing(block_size))


def snapshot(module):
    """Every tensor of a module, the plan too."""
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def assert_same_bits(module, before):
    after = snapshot(module)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def assert_works_as(layer, reference, device="cpu"):
    x = torch.randn(4, 70, dtype=layer.values.dtype, device=device)
    torch.testing.assert_close(layer(x), reference.to(device, x.dtype)(x))
    layer.matrix.validate()
    layer(x).sum().backward()
    assert layer.values.grad.shape == layer.values.shape


def test_state_dict_is_plain_tensors():
    layer = csb_layer()
    state = layer.state_dict()
    assert set(state) == {*ARRAYS, "bias"}
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert state["layout"].tolist() == [1, 16, 0, 8]
    assert [state[name].dtype for name in ARRAYS] == [torch.float32, torch.uint8, torch.int32, torch.uint8, torch.int32]
    assert state["values"].data_ptr() == layer.values.data_ptr()


@pytest.mark.parametrize(
    "sparsity, block_size", [(0.9, 16), (0.5, 16), (0.99, 64), (1.1, 32), (0.0, 256), (0.9, "bitmap")]
)
@pytest.mark.parametrize("own", [16, "bitmap"])
def test_another_pattern_nnz_and_layout_is_adopted(device, own, sparsity, block_size):
    layer, source = csb_layer(block_size=own).to(device), csb_layer(sparsity, block_size=block_size)
    values = layer.values
    assert layer.load_state_dict(source.state_dict()) == ([], [])
    assert layer.values is values and layer.values.device.type == device
    assert layer.matrix.layout == source.matrix.layout and layer.nnz == source.nnz
    loaded = snapshot(layer)
    assert all(torch.equal(loaded[name].cpu(), tensor) for name, tensor in snapshot(source).items())
    assert_works_as(layer, source.to_dense(), device)


def test_loading_shares_no_memory_with_the_state():
    source = csb_layer(0.8)
    state = source.state_dict()
    for target in (csb_layer(), copy.deepcopy(source)):
        target.load_state_dict(state)
        before = snapshot(target)
        for tensor in state.values():
            saved = tensor.clone()
            tensor.zero_()
            assert_same_bits(target, before)
            tensor.copy_(saved)


def test_codes_and_a_bitmap_of_one_length_are_told_apart():
    """32 entries in one block: 64 elements either way, and a copy would only change their dtype."""
    weight = torch.zeros(8, 8)
    weight[:4] = torch.arange(1.0, 33).view(4, 8)
    made = {blocks: CSBLinear(CSBMatrix.from_dense(weight, **packing(blocks))) for blocks in (64, "bitmap")}
    assert len({layer.codes.shape for layer in made.values()}) == 1
    for blocks, source in made.items():
        layer = copy.deepcopy(made["bitmap" if blocks == 64 else 64])
        layer.load_state_dict(source.state_dict())
        assert layer.codes.dtype == source.codes.dtype and torch.equal(layer.matrix.to_dense(), weight)
        layer.matrix.validate()


def test_a_layer_with_a_bitmap_is_copied_pickled_moved_and_emptied(device):
    layer = csb_layer(0.5, block_size="bitmap").to(device)
    x = torch.randn(3, 70, device=device)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu").to(device)):
        assert twin.matrix.layout.encoding == "bitmap" and torch.equal(twin(x), layer(x))
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    empty = copy.deepcopy(layer).to("meta").to_empty(device=device)
    with pytest.raises(RuntimeError, match="its tensors are unfilled"):
        empty(x)
    empty.load_state_dict(state)
    assert torch.equal(empty(x), layer(x))
    wide = copy.deepcopy(layer).double()
    assert wide.codes.dtype == torch.int64 and wide(x.double()).dtype == torch.float64
    wide.matrix.validate()


def test_a_dense_checkpoint_is_packed_in_the_layers_encoding():
    layer, source = csb_layer(block_size="bitmap"), dense_layer(0.7)
    layer.load_state_dict(source.state_dict())
    assert layer.matrix.layout.encoding == "bitmap" and torch.equal(layer.to_dense().weight, source.weight)


def test_the_layer_keeps_its_dtype():
    layer, source = csb_layer(dtype=torch.bfloat16), csb_layer(0.7, dtype=torch.float64)
    layer.load_state_dict(source.state_dict())
    assert layer.values.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.values, source.values.bfloat16())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_dense_checkpoint_is_packed_with_its_own_zeros(device, kind):
    if kind == "linear":
        layer, source = csb_layer().to(device), dense_layer(0.7)
    else:
        source = nn.Conv2d(70, 50, 1)
        source.weight.data *= torch.rand(50, 70, 1, 1) > 0.7
        layer = CSBConv2d.from_dense(nn.Conv2d(70, 50, 1), block_size=16).to(device)
    values = layer.values
    assert layer.load_state_dict(source.state_dict()) == ([], [])
    assert layer.values is values and layer.block_size == 16
    assert layer.nnz == source.weight.count_nonzero()
    assert torch.equal(layer.to_dense().weight.cpu(), source.weight)
    assert torch.equal(layer.bias.cpu(), source.bias)


def test_a_pruned_checkpoint_is_packed_with_its_mask():
    source = dense_layer(0.0)
    prune.random_unstructured(source, "weight", 0.8)
    prune.random_unstructured(source, "bias", 0.5)
    source.weight_orig.data[source.weight_mask.bool().nonzero()[0].unbind()] = 0
    layer = csb_layer()
    assert layer.load_state_dict(source.state_dict()) == ([], [])
    assert layer.nnz == source.weight_mask.sum()
    x = torch.randn(3, 70)
    torch.testing.assert_close(layer(x), source(x))


def test_a_gradient_survives_values_but_not_another_pattern():
    layer = csb_layer()
    layer(torch.randn(2, 70)).sum().backward()
    grad = layer.values.grad
    layer.load_state_dict({key: tensor.clone() for key, tensor in layer.state_dict().items()})
    assert layer.values.grad is grad
    layer.load_state_dict(csb_layer().state_dict())
    assert layer.values.grad is None and layer.bias.grad is not None


def test_an_optimizer_keeps_training_the_loaded_values():
    layer = csb_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.load_state_dict(csb_layer(0.5).state_dict())
    before = layer.values.detach().clone()
    layer(torch.randn(2, 70)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.values, before)


def test_assign_takes_the_tensors_themselves():
    layer, source = csb_layer(), csb_layer(0.8, dtype=torch.float64, block_size=32)
    layer.values.requires_grad_(False)
    state = source.state_dict()
    layer.load_state_dict(state, assign=True)
    assert layer.values.dtype == torch.float64 and layer.values.data_ptr() == state["values"].data_ptr()
    assert layer.codes.data_ptr() == state["codes"].data_ptr()
    assert isinstance(layer.values, nn.Parameter) and not layer.values.requires_grad and layer.bias.requires_grad
    layer.values.requires_grad_()
    assert_works_as(layer, source.to_dense())


def test_assign_fills_a_layer_on_the_meta_device():
    source = csb_layer(0.8)
    layer = csb_layer().to("meta")
    with pytest.raises(RuntimeError, match="values: the layer is on the meta device; load with assign=True"):
        layer.load_state_dict(source.state_dict())
    layer.load_state_dict(source.state_dict(), assign=True)
    assert_works_as(layer, source.to_dense())


def test_loading_after_to_empty_rebuilds_the_plan(device):
    source = csb_layer(0.8)
    layer = csb_layer().to("meta").to_empty(device=device)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.units.cpu(), source.units)
    assert_works_as(layer, source.to_dense(), device)


def test_missing_and_unexpected_keys_are_those_of_torch():
    model = nn.Sequential(csb_layer(), nn.ReLU())
    state = model.state_dict()
    without_bias = {key: tensor for key, tensor in state.items() if key != "0.bias"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.bias"'):
        model.load_state_dict(without_bias)
    assert model.load_state_dict(without_bias, strict=False) == (["0.bias"], [])
    extra = {**state, "0.scale": torch.ones(1), "0.a.b": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.scale", "0.a.b"'):
        model.load_state_dict(extra)
    assert model.load_state_dict(extra, strict=False) == ([], ["0.scale", "0.a.b"])
    everything = ", ".join(f'"0.{name}"' for name in [*ARRAYS, "bias"])
    with pytest.raises(RuntimeError, match=f"Missing.*{everything}"):
        model.load_state_dict({})
    no_bias = nn.Sequential(csb_layer(bias=False), nn.ReLU())
    assert no_bias.load_state_dict(state, strict=False) == ([], ["0.bias"])


def change(name, function):
    def apply(state):
        state[name] = function(state[name].clone())

    return apply


def put(position, value):
    def function(tensor):
        tensor[position] = value
        return tensor

    return function


def same_code_twice(codes):
    codes[2:4] = codes[0:2]
    return codes


DAMAGE = {
    "newer_format": (change("layout", put(0, 2)), "layout: .*newer torch_csb"),
    "unknown_order": (change("layout", put(2, 7)), "layout: .*order"),
    "odd_block_size": (change("layout", put(1, 48)), "layout: .*block_size.*48"),
    "other_block_size": (change("layout", put(1, 32)), "blk_ptr: "),
    "short_layout": (change("layout", lambda t: t[:3]), "layout: expected 4"),
    "float_layout": (change("layout", torch.Tensor.float), "layout: .*float32"),
    "integer_values": (change("values", torch.Tensor.int), "values: .*int32"),
    "short_values": (change("values", lambda t: t[:-1]), "values: "),
    "flat_codes_lost": (change("codes", lambda t: t[:-2]), "codes: "),
    "signed_codes": (change("codes", lambda t: t.view(torch.int8)), "codes: .*int8"),
    "long_blk_ptr": (change("blk_ptr", torch.Tensor.long), "blk_ptr: .*int64"),
    "falling_blk_ptr": (change("blk_ptr", put(1, 2**30)), "blk_ptr: .*monotone"),
    "shifted_blk_ptr": (change("blk_ptr", put(0, 8)), "blk_ptr: .*start at 0"),
    "short_blk_ptr": (change("blk_ptr", lambda t: t[:-1]), "blk_ptr: "),
    "too_much_padding": (change("blk_pad", put(0, 255)), "blk_pad: "),
    "row_out_of_block": (change("codes", put(1, 255)), "codes: .*rows below 16"),
    "out_of_matrix": (change("codes", lambda t: t.fill_(255).view(-1, 2).fill_(0).view(-1)), "codes: "),
    "coordinate_twice": (change("codes", same_code_twice), "codes: .*occurs 2 times"),
    "bias_of_another_size": (change("bias", lambda t: t[:-1]), r"bias: expected shape \(50,\), got \(49,\)"),
    "integer_bias": (change("bias", torch.Tensor.int), "bias: expected a floating dtype"),
    "no_tensor": (lambda state: state.update(codes=[1, 2]), "codes: expected a tensor, got list"),
    "no_codes": (lambda state: state.pop("codes"), "values: came without layer.codes"),
    "other_dense_shape": (
        lambda state: [state.pop(name) for name in ARRAYS] and state.update(weight=torch.zeros(50, 71)),
        r"weight: expected shape \(50, 70\), got \(50, 71\)",
    ),
    "no_mask": (
        lambda state: [state.pop(name) for name in ARRAYS] and state.update(weight_orig=torch.zeros(50, 70)),
        "weight_orig: came without layer.weight_mask",
    ),
    "integer_weight": (
        lambda state: [state.pop(name) for name in ARRAYS] and state.update(weight=torch.zeros(50, 70).int()),
        "weight: expected a floating dtype, got torch.int32",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("assign", [False, True])
def test_a_damaged_state_is_refused_by_name_and_the_layer_keeps_every_bit(device, damage, assign):
    break_it, message = DAMAGE[damage]
    model = nn.ModuleDict({"layer": csb_layer()}).to(device)
    model["layer"](torch.randn(2, 70, device=device)).sum().backward()
    before, grad = snapshot(model), model["layer"].values.grad
    state = dict(csb_layer(0.8).state_dict())
    break_it(state)
    with pytest.raises(RuntimeError, match=f"layer.{message}"):
        model.load_state_dict({f"layer.{key}": tensor for key, tensor in state.items()}, strict=False, assign=assign)
    assert_same_bits(model, before)
    assert model["layer"].values.grad is grad


def test_load_state_dict_pre_hooks_may_rename_keys():
    layer, source = csb_layer(), csb_layer(0.8)

    def rename(module, state_dict, prefix, *_):
        for key in [key for key in state_dict if key.startswith(prefix + "old_")]:
            state_dict[prefix + key[len(prefix) + 4 :]] = state_dict.pop(key)

    layer.register_load_state_dict_pre_hook(rename)
    layer.load_state_dict({f"old_{key}": tensor for key, tensor in source.state_dict().items()})
    assert torch.equal(layer.values, source.values)


def test_non_contiguous_arrays_load():
    source = csb_layer(0.8)
    state = {key: torch.stack([tensor, tensor], -1)[..., 0] for key, tensor in source.state_dict().items()}
    assert not state["values"].is_contiguous()
    for assign in (False, True):
        layer = csb_layer()
        layer.load_state_dict(state, assign=assign)
        assert_works_as(layer, source.to_dense())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_layer_are_equal_and_independent(device, way):
    layer = csb_layer().to(device)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_same_bits(twin, snapshot(layer))
    assert repr(twin) == repr(layer)
    before = snapshot(layer)
    with torch.no_grad():
        twin.values.add_(1)
        twin.codes.zero_()
    assert_same_bits(layer, before)


def test_a_state_dict_file_loads_with_weights_only(device):
    source, layer = csb_layer(0.8).to(device), csb_layer()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    layer.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(layer.values, source.values.cpu())
    assert_works_as(layer, source.cpu().to_dense())


def test_moving_keeps_the_pattern_and_the_layout(device):
    layer = csb_layer()
    before = snapshot(layer)
    moved = layer.to(device).double()
    assert moved is layer and layer.values.device.type == device and layer.values.dtype == torch.float64
    for name in ("codes", "blk_ptr", "blk_pad", "layout", "units"):
        buffer = layer.get_buffer(name)
        assert buffer.device.type == device and torch.equal(buffer.cpu(), before[name])
    assert_works_as(layer, layer.to_dense(), device)


def test_half_casts_no_integer():
    layer = csb_layer().half()
    assert layer.values.dtype == layer.bias.dtype == torch.float16
    assert {b.dtype for b in layer.buffers()} == {torch.uint8, torch.int32}


def test_functional_call_takes_other_values():
    layer = csb_layer()
    x = torch.randn(3, 70)
    doubled = {"values": 2 * layer.values.detach(), "bias": 2 * layer.bias.detach()}
    torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), 2 * layer(x))
