from __future__ import annotations

import copy
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_net import Net, sparse_net
from torch import nn

import torch_csb
from torch_csb import CSBConv2d, CSBLinear, load_into, relayout_, save
from torch_csb.io import LoadResult


def image(device="cpu"):
    return torch.randn(2, 8, 6, 6, device=device)


def snapshot(model):
    tensors = {f"{name} {id(t)}": t for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {name: t.detach().clone() for name, t in tensors.items()}, str(model), [id(m) for m in model.modules()]


def assert_same_bits(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:] and list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata(), set(file.keys())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("make", [lambda: sparse_net(0.7), lambda: Net().eval()], ids=["sparsified", "dense"])
def test_a_saved_model_loads_into_a_fresh_one(device, path, make):
    model, x = sparse_net().to(device), image(device)
    save(model, path)
    fresh = make().to(device)
    conv = fresh.conv
    assert load_into(fresh, path) == LoadResult([], [])
    assert torch.equal(fresh(x), model(x))
    assert type(fresh.conv) is CSBConv2d and fresh.conv.stride == (2, 2) and fresh.again[0] is fresh.fc
    assert fresh.out.weight is fresh.embed.weight
    assert (fresh.conv is conv) == (type(conv) is CSBConv2d)
    state, expected = fresh.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in state)
    fresh(x).sum().backward()


@pytest.mark.parametrize("make", [lambda: sparse_net(0.7), lambda: Net().eval()], ids=["sparsified", "dense"])
def test_bitmaps_are_saved_and_loaded(device, path, make):
    model, x = sparse_net(0.7).to(device), image(device)
    relayout_(model, encoding="bitmap")
    save(model, path)
    fresh = make().to(device)
    assert load_into(fresh, path) == LoadResult([], [])
    assert fresh.fc.matrix.layout.encoding == fresh.conv.matrix.layout.encoding == "bitmap"
    assert torch.equal(fresh(x), model(x))
    fresh(x).sum().backward()
    assert fresh.fc.values.grad.abs().sum() > 0


def test_a_loaded_model_does_not_stand_on_the_file(path):
    model = sparse_net()
    save(model, path)
    targets = [Net().eval(), sparse_net(0.7), sparse_net()]
    for target in targets:
        load_into(target, path)
    before = [snapshot(target) for target in targets]
    with open(path, "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    for target, saved in zip(targets, before, strict=True):
        assert_same_bits(target, saved)


def test_the_model_keeps_dtype_device_and_parameters(device, path):
    save(sparse_net(), path)
    model = sparse_net(0.7).double().to(device)
    values, bias = model.fc.values, model.fc.bias
    dense = Net().bfloat16().to(device)
    dense.fc.weight.requires_grad_(False)
    dense_bias = dense.fc.bias
    load_into(model, path)
    load_into(dense, path)
    assert model.fc.values is values and model.fc.bias is bias and dense.fc.bias is dense_bias
    assert values.dtype == torch.float64 and dense.fc.values.dtype == torch.bfloat16
    assert values.device.type == dense.fc.codes.device.type == device
    assert not dense.fc.values.requires_grad and dense.conv.values.requires_grad


def test_hooks_and_mode_of_a_replaced_layer_are_kept(path):
    save(sparse_net(), path)
    model, seen = Net().eval(), []
    model.fc.register_forward_hook(lambda *_: seen.append(1))
    load_into(model, path)
    model(image())
    assert seen == [1] and not model.fc.training


def test_shared_tensors_are_stored_once_and_restored(path):
    model = sparse_net()
    save(model, path)
    metadata, keys = header(path)
    aliases = json.loads(metadata["aliases"])
    assert metadata["format"] == "torch_csb" and metadata["format_version"] == "1"
    assert aliases["out.weight"] == "embed.weight" and aliases["again.0.values"] == "fc.values"
    assert keys.isdisjoint(aliases) and keys | set(aliases) == set(model.state_dict())
    untied = Net()
    untied.out.weight = nn.Parameter(torch.zeros(10, 48))
    load_into(untied, path)
    assert torch.equal(untied.out.weight, model.embed.weight)


def test_views_and_non_contiguous_tensors_are_saved(path):
    model = nn.Module()
    base = torch.randn(6, 8)
    views = {"whole": base, "turned": base.t(), "part": base[1:3], "column": base[:, 2], "flat": base.view(-1)}
    for name, view in {**views, "empty": base[:0], "none": torch.zeros(0)}.items():
        model.register_buffer(name, view)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save(model, path)
    twin = nn.Module()
    for name, tensor in expected.items():
        twin.register_buffer(name, torch.zeros_like(tensor))
    load_into(twin, path)
    assert all(torch.equal(twin.get_buffer(name), tensor) for name, tensor in expected.items())


def test_metadata_of_the_user_is_kept(path):
    save(sparse_net(), path, metadata={"epoch": "3"})
    assert header(path)[0]["epoch"] == "3"
    with pytest.raises(ValueError, match="metadata: the key 'format' is taken"):
        save(sparse_net(), path, metadata={"format": "mine"})
    with pytest.raises(TypeError, match="metadata: expected text for each key, got 'epoch': int"):
        save(sparse_net(), path, metadata={"epoch": 3})


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    save(sparse_net(), path)
    before = path.read_bytes()
    monkeypatch.setattr("torch_csb.io.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(sparse_net(), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_saved_file_has_the_permissions_of_any_file_or_of_the_old_one(path):
    save(sparse_net(), path)
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    save(sparse_net(), path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_state_that_is_no_tensor_is_refused(path):
    stateful = type("Stateful", (nn.Linear,), {"get_extra_state": lambda self: {"a": 1}})
    with pytest.raises(TypeError, match="0._extra_state: expected a tensor, got dict"):
        save(nn.Sequential(stateful(2, 2)), path)
    with pytest.raises(ValueError, match="0.weight: expected data, got a tensor on the meta device"):
        save(nn.Sequential(nn.Linear(2, 2, device="meta")), path)
    assert not path.exists()


def test_a_plain_dense_checkpoint_is_packed(device, path):
    dense = Net(0.8).eval()
    save_file({key: tensor.clone() for key, tensor in dense.state_dict().items()}, path)
    model = sparse_net().to(device)
    assert load_into(model, path) == LoadResult([], [])
    assert model.fc.nnz == dense.fc.weight.count_nonzero()
    x = image()
    torch.testing.assert_close(model(x.to(device)).cpu(), dense(x))
    plain = Net().eval()
    load_into(plain, path)
    assert torch.equal(plain(x), dense(x))


def test_a_csb_layer_itself_saves_and_loads(path):
    layer = sparse_net().fc
    save(layer, path)
    twin = sparse_net(0.7).fc
    load_into(twin, path)
    assert torch.equal(twin.values, layer.values) and torch.equal(twin.units, layer.units)
    dense = nn.Linear(64, 48)
    with pytest.raises(ValueError, match=r"the model itself is an nn.Linear.*CSBLinear.from_dense\(model\)"):
        load_into(dense, path)
    load_into(CSBLinear.from_dense(dense), path)


def test_strict_names_missing_and_unexpected_tensors(path):
    save(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), path)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    before = snapshot(model)
    message = r"missing c.weight, c.bias; unexpected b\.(weight, b.bias|bias, b.weight)"
    with pytest.raises(ValueError, match=message):
        load_into(model, path)
    assert_same_bits(model, before)
    missing, unexpected = load_into(model, path, strict=False)
    assert sorted(missing) == ["c.bias", "c.weight"] and sorted(unexpected) == ["b.bias", "b.weight"]
    assert torch.equal(model["a"].weight, load_file(path)["a.weight"])


def rewrite(path, change, metadata=None):
    """As an older version would have written it, without checksums: what they find is never looked at further."""
    old = {key: text for key, text in header(path)[0].items() if not key.startswith("crc32")}
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata=old if metadata is None else {**old, **metadata})


def put(name, position, value):
    def change(tensors):
        tensors[name].view(-1)[position] = value

    return change


def replace(name, function):
    def change(tensors):
        tensors[name] = function(tensors[name]).contiguous()

    return change


DAMAGE = {
    "code_out_of_range": (put("fc.codes", slice(None), 255), "fc.codes: "),
    "falling_prefix": (put("conv.blk_ptr", 0, 8), "conv.blk_ptr: "),
    "short_values": (replace("fc.values", lambda t: t[:-1]), "fc.values: "),
    "wrong_dtype": (replace("fc.blk_ptr", torch.Tensor.long), "fc.blk_ptr: .*int64"),
    "newer_layout": (put("fc.layout", 0, 2), "fc.layout: .*newer"),
    "no_codes": (lambda tensors: tensors.pop("fc.codes"), "fc.(values|weight|codes)"),
    "embedding_of_another_size": (
        replace("embed.weight", lambda t: t[:-1]),
        r"(embed|out).weight: expected shape \(10, 48\), got \(9, 48\)",
    ),
    "integer_running_mean": (
        replace("norm.running_mean", torch.Tensor.int),
        "norm.running_mean: expected torch.float32",
    ),
    "bias_of_another_size": (replace("fc.bias", lambda t: t[:-1]), "fc.bias: expected shape"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("make", [sparse_net, Net], ids=["sparsified", "dense"])
def test_a_damaged_file_is_refused_by_name_and_the_model_keeps_every_bit(device, path, damage, make):
    change, message = DAMAGE[damage]
    save(sparse_net(0.8), path)
    rewrite(path, change, {"aliases": "{}"} if damage == "no_codes" else None)
    model = make().to(device)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        load_into(model, path)
    assert_same_bits(model, before)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, share):
    save(sparse_net(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    model = sparse_net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
        load_into(model, path)
    assert_same_bits(model, before)


def test_a_header_that_lies_about_its_size_is_refused(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_into(sparse_net(), path)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"format_version": "2"}, "format_version: expected 1, got '2'; a newer torch_csb wrote this file"),
        ({"format_version": "x"}, "format_version: expected 1, got 'x'"),
        ({"aliases": "{"}, "aliases: expected JSON"),
        ({"aliases": "[1]"}, "aliases: expected an object of names"),
        ({"aliases": '{"a": 1}'}, "aliases: expected an object of names"),
        ({"aliases": '{"a": "nowhere"}'}, "'a' can't stand for 'nowhere'"),
        ({"aliases": '{"fc.values": "fc.bias"}'}, "'fc.values' can't stand for 'fc.bias'"),
    ],
)
def test_bad_metadata_is_refused(path, metadata, message):
    save(sparse_net(), path)
    rewrite(path, lambda tensors: None, metadata)
    model = sparse_net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_into(model, path)
    assert_same_bits(model, before)


def test_a_missing_file_is_told_as_such(path):
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_into(sparse_net(), path)


def test_a_csb_layer_meets_a_layer_that_cant_become_one(path):
    save(nn.ModuleDict({"a": sparse_net().fc}), path)

    class MyLinear(nn.Linear):
        pass

    tied = nn.ModuleDict({"a": nn.Linear(64, 48), "b": nn.Linear(64, 48)})
    tied["b"].weight = tied["a"].weight
    for model, reason, strict in (
        (nn.ModuleDict({"a": MyLinear(64, 48)}), "MyLinear", True),
        (nn.ModuleDict({"a": nn.ReLU()}), "ReLU", True),
        (tied, "tied weight", False),
        (nn.ModuleDict({"a": nn.Linear(64, 47)}), "blk_ptr|codes|a.bias", True),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"a.(values|codes|blk_ptr|bias): .*({reason})"):
            load_into(model, path, strict=strict)
        assert_same_bits(model, before)


def test_a_shared_module_may_be_two_in_the_target(path):
    save(sparse_net(), path)
    model = Net()
    model.again = nn.ModuleList([copy.deepcopy(model.fc)])
    load_into(model, path)
    assert type(model.again[0]) is CSBLinear and model.again[0] is not model.fc
    assert torch.equal(model.again[0].values, model.fc.values)
    assert model.again[0].values.data_ptr() != model.fc.values.data_ptr()


def test_save_and_load_are_public():
    assert torch_csb.save is save and torch_csb.load_into is load_into
