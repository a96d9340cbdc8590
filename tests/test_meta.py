from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from small_net import Net, sparse_net
from torch import nn

from torch_csb import CSBConv2d, CSBLinear, CSBMatrix, load_into, relayout_, save, sparsify_
from torch_csb.nn._layer import CSBLayer

UNFILLED = "its tensors are unfilled: load its state before it is used"


def image(device="cpu", dtype=torch.float32):
    return torch.randn(2, 8, 6, 6, device=device, dtype=dtype)


def sparse_layer(device="cpu"):
    dense = nn.Linear(70, 50)
    dense.weight.data *= torch.rand(50, 70) > 0.9
    return CSBLinear.from_dense(dense, block_size=16).to(device)


@pytest.fixture
def saved(tmp_path):
    net = sparse_net()
    path = tmp_path / "net.safetensors"
    save(net, path)
    return net, path


def meta_net(**options):
    with torch.device("meta"):
        return Net(**options).eval()


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_nothing_is_on_meta(model, device="cpu"):
    assert {tensor.device.type for tensor in tensors(model).values()} == {device}


@pytest.mark.parametrize("kind", ["dense", "csb"])
def test_a_model_on_the_meta_device_is_filled_from_a_file(device, saved, kind):
    net, path = saved
    model = meta_net() if kind == "dense" else copy.deepcopy(net).to("meta")
    frozen = model.norm.weight
    frozen.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a copy to meta is a no-op
        assert load_into(model, path, device=device) == ([], [])
    assert_nothing_is_on_meta(model, device)
    assert type(model.fc) is CSBLinear and type(model.conv) is CSBConv2d and model.again[0] is model.fc
    x = image(device)
    torch.testing.assert_close(model(x), net.to(device)(x), rtol=0, atol=0)
    assert not model.norm.weight.requires_grad and model.fc.values.requires_grad and model.embed.weight.requires_grad
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    model(x).sum().backward()
    assert model.fc.values.grad.abs().sum() > 0
    model.fc.matrix.validate()


@pytest.mark.parametrize("kind", ["dense", "csb"])
def test_a_model_on_the_meta_device_takes_bitmaps(device, tmp_path, kind):
    net = sparse_net(0.7)
    other = copy.deepcopy(net).to("meta")
    relayout_(net, encoding="bitmap")
    save(net, tmp_path / "net.safetensors")
    model = meta_net() if kind == "dense" else other
    assert load_into(model, tmp_path / "net.safetensors", device=device) == ([], [])
    x = image(device)
    assert model.fc.matrix.layout.encoding == "bitmap"
    assert torch.equal(model(x), net.to(device)(x))


def test_what_was_tied_stays_tied(saved):
    _, path = saved
    model = meta_net()
    assert model.out.weight is model.embed.weight
    load_into(model, path)
    assert model.out.weight is model.embed.weight
    assert len(list(model.parameters())) == len(list(Net().parameters()))


def test_the_models_dtype_is_kept(saved):
    net, path = saved
    model = meta_net().double()
    load_into(model, path)
    assert {p.dtype for p in model.parameters()} == {
        torch.float64
    } and model.norm.num_batches_tracked.dtype == torch.int64
    assert torch.equal(model.fc.values, net.fc.values.double())


def test_the_file_may_go_away_and_change(saved):
    net, path = saved
    model = meta_net()
    load_into(model, path)
    path.write_bytes(b"\0" * path.stat().st_size)
    x = image()
    assert torch.equal(model(x), net(x))


def test_default_device_is_torchs_and_meta_is_refused(saved):
    net, path = saved
    model = meta_net()
    with torch.device("meta"), pytest.raises(ValueError, match="device: expected one that holds data, got meta"):
        load_into(model, path)
    with torch.device("cpu"):
        load_into(model, path)
    assert_nothing_is_on_meta(model)


def test_a_file_that_does_not_fit_leaves_the_model_on_meta(saved):
    net, path = saved
    for change, message in (
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda state: state["fc.blk_ptr"].mul_(2), "fc.values: invariant 6"),
        (lambda state: state.pop("norm.weight"), "missing norm.weight"),
    ):
        state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        change(state)
        from safetensors.torch import save_file

        save_file(state, path)
        model = meta_net()
        before = {name: id(tensor) for name, tensor in tensors(model).items()}
        with pytest.raises(ValueError, match=message):
            load_into(model, path)
        assert {name: id(tensor) for name, tensor in tensors(model).items()} == before
        assert type(model.fc) is nn.Linear


def test_a_buffer_that_no_file_holds_is_named(saved):
    net, path = saved
    with torch.device("meta"):
        model = Net().eval()
        model.norm.register_buffer("table", torch.arange(3.0), persistent=False)
    with pytest.raises(
        ValueError, match="missing norm.table; no file holds norm.table, a buffer with persistent=False"
    ):
        load_into(model, path)
    assert load_into(model, path, strict=False).missing_keys == ["norm.table"]
    assert model.norm.table.is_meta and not model.norm.weight.is_meta


def test_half_on_meta_half_not(saved):
    net, path = saved
    model = Net().eval()
    model.fc.to("meta")
    kept = model.norm.weight
    load_into(model, path)
    assert model.norm.weight is kept and type(model.fc) is CSBLinear
    assert torch.equal(model(image().fill_(1)), net(image().fill_(1)))


def test_assign_fills_a_csb_model_on_meta_with_the_very_tensors(device):
    net = sparse_net().to(device)
    model = copy.deepcopy(net).to("meta")
    state = net.state_dict()
    assert model.load_state_dict(state, assign=True) == ([], [])
    assert_nothing_is_on_meta(model, device)
    assert model.fc.values.data_ptr() == state["fc.values"].data_ptr()
    x = image(device)
    assert torch.equal(model(x), net(x))


def test_a_layer_on_meta_tells_shapes_and_refuses_data(device):
    layer = sparse_layer().to("meta")
    assert layer(torch.randn(3, 70, device="meta")).shape == (3, 50)
    assert "stored=" in repr(layer)
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(RuntimeError, match=r"got one on meta; load the layer's state"),
        ):
            layer(torch.randn(3, 70, device=device))


@pytest.mark.parametrize("start", ["meta", "device"])
@pytest.mark.parametrize("load", ["load_state_dict", "assign", "load_into"])
def test_to_empty_is_refused_until_the_state_is_there(device, saved, start, load):
    net, path = saved
    model = copy.deepcopy(net).to("meta" if start == "meta" else device).to_empty(device=device)
    x = image(device)
    for layer in (model.fc, model.conv):
        with pytest.raises(RuntimeError, match=UNFILLED):
            layer(torch.randn(2, 64, device=device) if layer is model.fc else x)
        with pytest.raises(RuntimeError, match=UNFILLED):
            layer.to_dense()
        assert "unfilled" in repr(layer)
    if load == "load_into":
        load_into(model, path)
    else:
        model.load_state_dict({k: t.to(device) for k, t in net.state_dict().items()}, assign=load == "assign")
    assert "unfilled" not in repr(model) and "forward" not in vars(model.fc)
    assert torch.equal(model(x), copy.deepcopy(net).to(device)(x))


def test_a_state_that_is_refused_leaves_it_unfilled():
    model = nn.Sequential(sparse_layer()).to_empty(device="cpu")
    state = nn.Sequential(sparse_layer()).state_dict()
    state["0.codes"] = state["0.codes"][:-2]
    with pytest.raises(RuntimeError, match="0.codes"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=UNFILLED):
        model(torch.randn(1, 70))


def test_filling_the_buffers_in_place_counts_too(device):
    source = sparse_layer(device)
    layer = copy.deepcopy(source).to_empty(device=device)
    x = torch.randn(3, 70, device=device)
    with torch.no_grad():
        for name in ("values", "codes", "blk_ptr"):
            getattr(layer, name).copy_(getattr(source, name))
        layer.bias.copy_(source.bias)
        layer.blk_pad.fill_(255)
        with pytest.raises(RuntimeError, match=f"{UNFILLED}.*blk_pad"):
            layer(x)
        layer.blk_pad.copy_(source.blk_pad)
    assert torch.equal(layer(x), source(x)) and torch.equal(layer.units, source.units)
    assert "forward" not in vars(layer) and torch.equal(layer.layout, source.layout)


def test_a_layout_that_came_with_the_buffers_counts_too():
    def one_block(block_size):
        return CSBLinear(CSBMatrix.from_dense(torch.eye(12), block_size=block_size))

    source, layer = one_block(64), one_block(16).to_empty(device="cpu")
    with torch.no_grad():
        for name in ("values", "codes", "blk_ptr", "blk_pad", "layout"):
            getattr(layer, name).copy_(getattr(source, name))
    x = torch.randn(3, 12)
    assert torch.equal(layer(x), x) and layer.block_size == 64
    layer.matrix.validate()


def test_moves_and_casts_are_no_to_empty(device):
    layer = sparse_layer()
    expected = layer.to_dense().weight
    for moved in (layer.to(device), layer.double(), layer.float(), layer.to(device=device, dtype=torch.float32)):
        assert "forward" not in vars(moved) and torch.equal(moved.to_dense().weight.cpu(), expected)
    assert "forward" not in vars(copy.deepcopy(layer).to("meta"))


def test_copies_of_an_unfilled_layer_are_unfilled_and_know_themselves():
    layer = sparse_layer().to_empty(device="cpu")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match=UNFILLED):
            twin(torch.randn(1, 70))
        source = sparse_layer()
        twin.load_state_dict(source.state_dict())
        x = torch.randn(2, 70)
        assert torch.equal(twin(x), source(x))
        with pytest.raises(RuntimeError, match=UNFILLED):
            layer(x)


class Built(nn.Module):
    """A model that is written with CSB layers."""

    def __init__(self):
        super().__init__()
        self.fc = CSBLinear.empty(70, 50, activation="relu")
        self.out = nn.Linear(50, 3)

    def forward(self, x):
        return self.out(self.fc(x))


@pytest.mark.parametrize("where", ["meta", "device"])
@pytest.mark.parametrize("load", ["load_state_dict", "load_into"])
def test_a_model_written_with_empty_layers_is_built_anywhere_and_filled(device, tmp_path, where, load):
    source = Built().to(device)
    source.fc = sparse_layer(device)
    source.fc.activation = "relu"
    with torch.device("meta" if where == "meta" else device):
        model = Built()
    assert {p.device.type for p in model.parameters()} == {"meta" if where == "meta" else device}
    x = torch.randn(4, 70, device=device)
    with pytest.raises(RuntimeError, match="unfilled|got one on meta"):
        model(x)
    if load == "load_into":
        save(source, tmp_path / "built.safetensors")
        load_into(model, tmp_path / "built.safetensors", device=device)
    else:
        model.load_state_dict(source.state_dict(), assign=where == "meta")
    assert torch.equal(model(x), source(x)) and (model(x) != 0).any()


def test_an_empty_layer_is_what_it_says():
    layer = CSBLinear.empty(70, 50, bias=False, block_size=32, dtype=torch.bfloat16, target="cpu")
    assert (layer.m, layer.k, layer.block_size, layer.bias) == (50, 70, 32, None)
    assert layer.values.dtype == torch.bfloat16 and layer.values.numel() == 0
    assert CSBLinear.empty(70, 50, device="meta").values.is_meta
    with pytest.raises(RuntimeError, match=f"CSBLinear: {UNFILLED}.*there are no entries"):
        layer(torch.randn(1, 70, dtype=torch.bfloat16))
    dense = nn.Linear(70, 50, bias=False)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.to_dense().weight, dense.weight.bfloat16())
    assert layer.block_size == 32
    with pytest.raises(ValueError, match="target: expected one of"):
        CSBLinear.empty(4, 4, target="tpu")


def test_a_zero_weight_that_was_loaded_runs():
    dense = nn.Linear(70, 50)
    dense.weight.data.zero_()
    layer = CSBLinear.empty(70, 50)
    layer.load_state_dict(dense.state_dict())
    x = torch.randn(2, 70)
    assert torch.equal(layer(x), dense.bias.expand(2, 50))


def test_sparsify_keeps_meta_layers_with_a_reason():
    model = meta_net()
    with pytest.warns(UserWarning, match="unsupported weight"):
        report = sparsify_(model)
    assert "it is on meta" in report.kept[0].reason
    assert not any(isinstance(module, CSBLayer) for module in model.modules())
