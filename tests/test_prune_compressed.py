from __future__ import annotations

import json
import random
import struct
import zlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_csb import CSBLinear, CSBMatrix, sparsify_
from torch_csb.prune import _sections
from torch_csb.prune.compressed import load_compressed, save_compressed
from torch_csb.prune.sharing import kmeans, share_


class Net(nn.Module):
    """A convolution, buffers, two Linears, a shared module, tied weights."""

    def __init__(self, sparsity=0.9):
        super().__init__()
        self.embed = nn.Embedding(10, 48)
        self.conv = nn.Conv2d(8, 64, 1)
        self.norm = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 48)
        self.again = nn.ModuleList([self.fc])
        self.out = nn.Linear(48, 10, bias=False)
        self.out.weight = self.embed.weight
        for layer in (self.conv, self.fc):
            layer.weight.data *= torch.rand_like(layer.weight) >= sparsity

    def forward(self, x):
        return self.out(self.fc(self.norm(self.conv(x)).mean((2, 3))))


def sparse_net(sparsity=0.9, bits=None):
    net = Net(sparsity).eval()
    net.norm.running_mean.normal_()
    sparsify_(net)
    if bits:
        share_(net, bits).finish()
    return net


def layer_of(matrix):
    return nn.ModuleDict({"fc": CSBLinear(matrix)})


def bits_of(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def state_of(model):
    return {key: (t.dtype, tuple(t.shape), bits_of(t).clone()) for key, t in model.state_dict().items()}


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    for key, (dtype, shape, bits) in expected.items():
        assert state[key][:2] == (dtype, shape) and torch.equal(state[key][2], bits), key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.csbz"


# Weight sharing.


def test_kmeans_of_six_numbers_by_hand():
    # Start 0, 5, 10; 5 attracts nothing and is left out; the means are (0 + 1 + 2)/3 and (9 + 10 + 11)/3.
    centroids, codes = kmeans(torch.tensor([9.0, 0.0, 2.0, 10.0, 1.0, 11.0]), 2)
    assert centroids.tolist() == [1.0, 10.0] and codes.tolist() == [1, 0, 0, 1, 0, 1]
    centroids, codes = kmeans(torch.tensor([0.0, 0.25, 0.5, 8.0]), 3)
    assert centroids.tolist() == [0.25, 8.0] and codes.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kmeans_keeps_few_values_and_ends_where_every_centroid_is_a_mean(dtype):
    few = torch.tensor([3.0, -1.0, 3.0, 0.5], dtype=dtype)
    centroids, codes = kmeans(few, 4)
    assert centroids.dtype == dtype and torch.equal(centroids[codes.long()], few)
    assert [len(part) for part in kmeans(few[:0], 4)] == [0, 0]
    values = torch.randn(5000).to(dtype)
    centroids, codes = kmeans(values, 16)
    assert len(centroids) <= 16 and torch.equal(codes.unique(), torch.arange(len(centroids), dtype=torch.uint8))
    distances = (values[:, None].double() - centroids.double()).abs()
    assert torch.equal(distances.min(1).values, distances[torch.arange(5000), codes.long()])
    if dtype in (torch.float64, torch.float32):
        means = torch.stack([values[codes == j].double().mean() for j in range(len(centroids))])
        torch.testing.assert_close(centroids.double(), means, rtol=1e-6, atol=1e-7)


def test_share_leaves_few_values_and_the_same_ones_each_time(device):
    model, twin = sparse_net().to(device), Net().eval().to(device)
    sparsify_(twin, min_sparsity=0)
    twin.load_state_dict(model.state_dict())
    before = {name: model.get_submodule(name).values for name in ("conv", "fc")}
    sharing = share_(model, {"conv": 8, "fc": 4})
    share_(twin, {"conv": 8, "fc": 4})
    assert list(sharing) == ["conv", "fc"]
    for name, bits in (("conv", 8), ("fc", 4)):
        layer, shared = model.get_submodule(name), sharing[name]
        assert layer.values is before[name] and shared.codes.dtype == torch.uint8
        assert len(layer.values.unique()) <= 2**bits + 1  # and the padding
        entry = layer.matrix.is_entry
        assert torch.equal(layer.values[entry], shared.codebook[shared.codes.long()])
        assert not layer.values[~entry].any()
        assert torch.equal(layer.values, twin.get_submodule(name).values)
    layer.matrix.validate()


def test_the_gradient_of_a_centroid_is_the_sum_over_its_code(device):
    model = layer_of(CSBMatrix.from_dense((torch.randn(40, 30) * (torch.rand(40, 30) > 0.8)).double().to(device)))
    layer, x = model["fc"], torch.randn(7, 30, dtype=torch.float64, device=device)
    shared = share_(model, 2)["fc"]
    codebook = shared.codebook.clone().requires_grad_()
    # The same network with the codebook as the Parameter, and autograd's own sums.
    codes = torch.full((layer.values.numel(),), -1, device=device)
    codes[layer.matrix.is_entry] = shared.codes.long()
    numbers = layer.matrix.with_values(codes.double() + 2).to_dense().long()
    weight = torch.cat([codebook.new_zeros(2), codebook])[numbers]
    F.linear(x, weight).square().sum().backward()
    layer(x).square().sum().backward()
    grad = layer.values.grad[layer.matrix.is_entry]
    torch.testing.assert_close(grad, codebook.grad[shared.codes.long()])
    assert not layer.values.grad[~layer.matrix.is_entry].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_an_optimizer_moves_centroids(make):
    model = layer_of(CSBMatrix.from_dense(torch.randn(40, 30) * (torch.rand(40, 30) > 0.8)))
    layer, x = model["fc"], torch.randn(7, 30)
    sharing = share_(model, 3)
    shared, entry = sharing["fc"], layer.matrix.is_entry
    codebook = nn.Parameter(shared.codebook.clone())
    optimizer, reference = make([layer.values]), make([codebook])
    for _ in range(5):
        row, col = layer.matrix.to_coo().indices()
        order = layer.matrix.with_values(torch.arange(len(entry)).double()).to_coo().values().long()
        codes = torch.zeros(len(entry), dtype=torch.long).masked_scatter(entry, shared.codes.long())[order]
        weight = torch.zeros(40, 30).index_put((row, col), codebook[codes])
        reference.zero_grad()
        F.linear(x, weight).square().mean().backward()
        reference.step()
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        sharing.step()
        torch.testing.assert_close(shared.codebook, codebook.detach(), rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.values[entry], shared.codebook[shared.codes.long()])
    assert not layer.values[~entry].any()
    sharing.finish()
    sharing.finish()
    layer.values.grad = None
    layer(x).square().mean().backward()
    assert len(layer.values.grad.unique()) > 8 + 1


def test_share_refuses_what_it_cannot_do_and_changes_nothing():
    model = sparse_net()
    before = state_of(model)
    for bits, message in ((0, "from 1 to 8, got 0"), (9, "got 9"), (True, "got True"), ({"norm": 4}, "got 'norm'")):
        with pytest.raises(ValueError, match=message):
            share_(model, bits)
    with pytest.raises(ValueError, match="at least one CSB layer"):
        share_(Net())
    assert_same_state(state_of(model), before)
    model.fc.values.data[0] = float("nan")
    with pytest.raises(ValueError, match="fc.values: expected finite"):
        share_(model)
    assert torch.equal(bits_of(model.conv.values), before["conv.values"][2])
    model.fc.values.data[0] = 0
    sharing = share_(model)
    model.load_state_dict(sparse_net(0.5).state_dict())
    with pytest.raises(ValueError, match="stored entries that were shared"):
        sharing.step()


# The file.


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("make", [lambda: sparse_net(0.7), lambda: Net().eval()], ids=["sparsified", "dense"])
def test_a_model_comes_back_bit_for_bit(device, path, bits, make):
    model = sparse_net(bits=bits).to(device)
    sizes = save_compressed(model, path)
    assert sizes.file == path.stat().st_size
    fresh = make().to(device)
    assert load_compressed(fresh, path) is None
    assert_same_state(state_of(fresh), state_of(model))
    assert fresh.again[0] is fresh.fc and fresh.out.weight is fresh.embed.weight
    x = torch.randn(2, 8, 6, 6, device=device)
    assert torch.equal(fresh(x), model(x))
    fresh(x).sum().backward()


SHAPES = {
    "no_rows": (0, 5, 0.0),
    "no_columns": (5, 0, 0.0),
    "empty": (30, 20, 0.0),
    "one_element": (1, 1, 1.0),
    "full": (33, 17, 1.0),
    "one_row": (1, 700, 0.1),
    "one_column": (700, 1, 0.1),
    "far_gaps": (300, 300, 0.001),
    "many_far_gaps": (600, 600, 0.003),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [2, 16, 256])
def test_every_shape_dtype_and_block_size(path, shape, dtype, block_size):
    m, k, density = SHAPES[shape]
    dense = torch.randn(m, k).to(dtype)
    model = layer_of(CSBMatrix.from_dense(dense, torch.rand(m, k) < density, block_size=block_size))
    save_compressed(model, path)
    fresh = layer_of(CSBMatrix.from_dense(torch.zeros(m, k, dtype=dtype), block_size=64))
    load_compressed(fresh, path)
    assert_same_state(state_of(fresh), state_of(model))
    fresh["fc"].matrix.validate()


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 510, 70000])
def test_gaps_around_the_largest_byte(path, gap):
    mask = torch.zeros(1, gap + 3, dtype=torch.bool)
    mask[0, 0] = mask[0, gap + 1] = True
    model = layer_of(CSBMatrix.from_dense(torch.randn(1, gap + 3), mask))
    save_compressed(model, path)
    fresh = layer_of(CSBMatrix.from_dense(torch.zeros(1, gap + 3)))
    load_compressed(fresh, path)
    assert_same_state(state_of(fresh), state_of(model))


@pytest.mark.parametrize("few", [True, False])
def test_every_bit_pattern_of_a_value_is_kept(path, few):
    bits = [0x80000000, 0, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 1, 0x3F800000]
    special = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32)
    values = special.repeat(100) if few else torch.cat([special, torch.randn(792).view(torch.int32)])
    dense = values[torch.randperm(800)].view(torch.float32).view(20, 40)
    model = layer_of(CSBMatrix.from_dense(dense, torch.ones(20, 40, dtype=torch.bool)))
    save_compressed(model, path)
    fresh = layer_of(CSBMatrix.from_dense(torch.zeros(20, 40)))
    load_compressed(fresh, path)
    assert_same_state(state_of(fresh), state_of(model))


def test_the_model_keeps_its_dtype_and_parameters(device, path):
    save_compressed(sparse_net(bits=4), path)
    model = sparse_net(0.7).double().to(device)
    values = model.fc.values
    load_compressed(model, path)
    assert model.fc.values is values and values.dtype == torch.float64 and values.device.type == device


def test_other_tensors_of_every_kind(path):
    def fill(model):
        for number, name in enumerate(("int64", "int32", "int16", "int8", "uint8", "complex64", "complex128")):
            model.register_buffer(name, (100 * torch.randn(3, number)).to(getattr(torch, name)))
        model.register_buffer("bool", torch.rand(5) > 0.5)
        model.register_buffer("scalar", torch.randn(()))
        model.register_buffer("strided", torch.randn(4, 6).t())
        model.register_buffer("conj", torch.randn(4, dtype=torch.complex64).conj())
        return model

    model, fresh = fill(nn.Module()), fill(nn.Module())
    save_compressed(model, path)
    load_compressed(fresh, path)
    assert all(torch.equal(tensor, model.get_buffer(name)) for name, tensor in fresh.named_buffers())
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="sparse: expected a dense tensor"):
        save_compressed(model, path)


def test_each_step_makes_the_model_smaller(path):
    layer = nn.Linear(512, 512)
    layer.weight.data *= torch.rand_like(layer.weight) >= 0.9
    model = nn.Sequential(layer)
    sparsify_(model)
    raw = save_compressed(model, path)
    assert raw.codes == raw.csb
    for bits in (8, 4):
        share_(model, bits).finish()
        sizes = save_compressed(model, path)
        assert sizes.dense > sizes.csb > sizes.codes > sizes.file and sizes.file < raw.file
    matrix = model[0].matrix
    assert sizes.dense == 4 * (512 * 512 + 512)
    assert sizes.csb == 6 * matrix.values.numel() + 5 * matrix.blk_pad.numel() + 4 + 16 + 4 * 512
    assert sizes.codes == sizes.csb - 4 * matrix.values.numel() + -(-matrix.nnz // 2) + 4 * 16
    # Gaps of a random pattern have an entropy of 4.7 bits at 90 %, codes at most 4.
    assert 8 * (sizes.file - 4 * 512 - 1500) / matrix.nnz < 4.9 + 4.1


def test_a_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    save_compressed(sparse_net(), path)
    before = path.read_bytes()
    path.chmod(0o640)
    save_compressed(sparse_net(), path)
    assert path.stat().st_mode & 0o777 == 0o640 and path.read_bytes() != before
    before = path.read_bytes()
    monkeypatch.setattr(_sections.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_compressed(sparse_net(), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


# Files that are not to be trusted.


def refused(model, path, before, message="."):
    with pytest.raises(ValueError, match=message) as error:
        load_compressed(model, path)
    assert str(error.value).startswith(f"{path}: ")
    assert_same_state(state_of(model), before)
    return str(error.value).removeprefix(f"{path}: ")


def test_a_thousand_random_corruptions_are_refused(path):
    save_compressed(sparse_net(bits=4), path)
    model, good, draw = sparse_net(0.7), path.read_bytes(), random.Random(0)
    before, kept = state_of(model), model.fc.values
    for _ in range(1000):
        bad = bytearray(good)
        at, kind = draw.randrange(len(bad)), draw.randrange(5)
        if kind == 0:
            bad[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            for i in range(draw.randint(1, 20)):
                bad[(at + i) % len(bad)] = draw.randrange(256)
        elif kind == 2:
            del bad[at:]
        elif kind == 3:
            del bad[at : at + draw.randint(1, 20)]
        else:
            bad[at:at] = draw.randbytes(draw.randint(1, 20))
        if bytes(bad) == good:
            continue
        path.write_bytes(bad)
        assert refused(model, path, before).startswith(("section '", "header: ", "start of the file: ", "end of the"))
    assert model.fc.values is kept
    path.write_bytes(good)
    load_compressed(model, path)


def test_the_section_that_is_cut_or_changed_is_named(path):
    save_compressed(sparse_net(bits=4), path)
    good, model = path.read_bytes(), sparse_net(0.7)
    before = state_of(model)
    length = struct.unpack_from("<8sII", good)[1]
    at = 16 + length
    for name, (stored, _, _) in json.loads(good[16:at])["sections"].items():
        if stored:
            path.write_bytes(good[: at + stored - 1])
            refused(model, path, before, f"section '{name}': expected {stored} bytes, got {stored - 1}.*truncated")
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            refused(model, path, before, f"section '{name}': expected crc32.*altered")
        at += stored
    path.write_bytes(good + b"x")
    refused(model, path, before, "end of the file")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="model.csbz"):
        load_compressed(model, path)


def parts_of(path):
    """Header and stored sections of a good file."""
    good = path.read_bytes()
    at = 16 + struct.unpack_from("<8sII", good)[1]
    header, stored = json.loads(good[16:at]), {}
    for name, (size, _, _) in header["sections"].items():
        stored[name], at = good[at : at + size], at + size
    return header, stored


def forge(path, header, stored):
    """A file whose checksums hold, whatever else it says: None in a section's record is filled in."""
    if isinstance(header["sections"], dict):
        for name, data in stored.items():
            true = (len(data), len(data), zlib.crc32(data))
            record = header["sections"][name]
            header["sections"][name] = [true[i] if number is None else number for i, number in enumerate(record)]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<8sII", b"torchcsb", len(text), zlib.crc32(text)) + text + b"".join(stored.values()))


def plain(name, data):
    def change(header, stored):
        stored[name] = data(header) if callable(data) else data
        header["sections"][name] = [None, None, None]

    return change


def field(*keys, value):
    def change(header, _):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def bomb(header, stored):
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    stored["layer fc: values"] = coder.compress(bytes(10**8)) + coder.flush()
    header["sections"]["layer fc: values"] = [None, header["layers"]["fc"]["nnz"], None]


def both(*changes):
    def change(header, stored):
        for one in changes:
            one(header, stored)

    return change


LAYER = ("layers", "fc")
FORGED = {
    "code_above_the_codebook": (
        plain("layer fc: values", lambda h: bytes([0] * (h["layers"]["fc"]["nnz"] - 1) + [200])),
        "section 'layer fc: values': expected codes below 16, got 200",
    ),
    "gaps_past_the_end": (
        plain("layer fc: gaps", lambda h: bytes([254] * h["layers"]["fc"]["nnz"])),
        "section 'layer fc: gaps': the gaps lead outside the 48 x 64",
    ),
    "far_gap_without_distance": (
        plain("layer fc: gaps", lambda h: bytes([255] + [0] * (h["layers"]["fc"]["nnz"] - 1))),
        "section 'layer fc: far gaps': expected 4 plain bytes, got 0",
    ),
    "negative_distance": (
        both(
            plain("layer fc: gaps", lambda h: bytes([255] + [0] * (h["layers"]["fc"]["nnz"] - 1))),
            plain("layer fc: far gaps", b"\xff\xff\xff\xff"),
        ),
        "section 'layer fc: far gaps': expected gaps from 255 to 3071",
    ),
    "bomb_beyond_its_size": (bomb, "section 'layer fc: values': expected"),
    "bomb_with_its_size": (
        both(bomb, field("sections", "layer fc: values", value=[None, 10**8, None])),
        "section 'layer fc: values': expected .* plain bytes, got 100000000",
    ),
    "no_deflate_stream": (
        both(
            plain("tensor fc.bias", b"\xff" * 100),
            field("sections", "tensor fc.bias", value=[None, 192, None]),
        ),
        "section 'tensor fc.bias': expected a deflate stream",
    ),
    "huge_nnz": (field(*LAYER, "nnz", value=2**62), "layer 'fc': nnz: expected at most 3072"),
    "other_nnz": (field(*LAYER, "nnz", value=3), "section 'layer fc: gaps': expected 3 plain bytes"),
    "huge_matrix": (field(*LAYER, "size", value=[2**31, 2**31]), "layer 'fc': expected the model's size"),
    "transposed": (field(*LAYER, "size", value=[64, 48]), r"the model's size \[48, 64\], got \[64, 48\]"),
    "boolean_codebook": (field(*LAYER, "codebook", value=True), "layer 'fc': codebook"),
    "large_codebook": (field(*LAYER, "codebook", value=257), "layer 'fc': codebook: expected at most 256"),
    "small_codebook": (field(*LAYER, "codebook", value=8), "layer fc: values': expected codes below 8"),
    "dtype": (field(*LAYER, "dtype", value=["float32"]), "layer 'fc': dtype"),
    "dtype_of_integers": (field(*LAYER, "dtype", value="int32"), "layer 'fc': dtype"),
    "newer_layout": (field(*LAYER, "layout", value=[2, 64, 0, 8]), "layer 'fc': layout: .*newer"),
    "block_size": (field(*LAYER, "layout", value=[1, 48, 0, 8]), "layer 'fc': block_size"),
    "layout_of_text": (field(*LAYER, "layout", value="1234"), "layer 'fc': layout"),
    "layer_of_text": (field("layers", "fc", value="x"), "layer 'fc': expected an object, got str"),
    "unknown_layer": (field("layers", "nowhere", value={}), "layer 'nowhere': .*no weight there"),
    "layer_without_a_weight": (field("layers", "again", value={}), "layer 'again': .*no weight there"),
    "layer_of_one_dimension": (field("layers", "norm", value={}), "layer 'norm': .*no weight there"),
    "layers": (field("layers", value=[]), "header: layers: expected an object, got list"),
    "checksum": (field("sections", "tensor fc.bias", value=[None, 192, 0]), "section 'tensor fc.bias': expected crc32"),
    "no_sections": (field("sections", value=None), "header: sections: expected an object"),
    "section_record": (field("sections", "tensor fc.bias", value=[1, 2]), "section 'tensor fc.bias': expected three"),
    "negative_size": (field("sections", "tensor fc.bias", value=[-1, 2, 3]), "'tensor fc.bias': expected three"),
    "fractional_size": (field("sections", "tensor fc.bias", value=[1.5, 2, 3]), "'tensor fc.bias': expected three"),
    "infinite_size": (field("sections", "tensor fc.bias", value=[float("inf"), 2, 3]), "expected three sizes"),
    "unused_section": (plain("tensor nothing", b"abc"), "section 'tensor nothing': belongs to no tensor"),
    "shape": (field("tensors", "fc.bias", value=["float32", [47]]), "tensor 'fc.bias': 192 bytes are no float32"),
    "negative_shape": (field("tensors", "fc.bias", value=["float32", [-48]]), "tensor 'fc.bias'"),
    "enormous_shape": (field("tensors", "fc.bias", value=["float32", [10**30]]), "tensor 'fc.bias'"),
    "shape_of_text": (field("tensors", "fc.bias", value=["float32", ["48"]]), "tensor 'fc.bias'"),
    "nested_shape": (field("tensors", "fc.bias", value=["float32", [[48]]]), "tensor 'fc.bias'"),
    "integers_for_floats": (field("tensors", "fc.bias", value=["int32", [48]]), "fc.bias: expected a floating"),
    "tensor_dtype": (field("tensors", "fc.bias", value=["object", [48]]), "tensor 'fc.bias': expected a dtype"),
    "bad_bool": (field("tensors", "fc.bias", value=["bool", [192]]), "'tensor fc.bias': expected bytes 0 and 1"),
    "array_of_a_layer": (field("tensors", "fc.codes", value=["uint8", [0]]), "'fc.codes': belongs to a CSB layer"),
    "missing_tensor": (lambda h, s: h["tensors"].pop("fc.bias"), "section 'tensor fc.bias': belongs to no tensor"),
    "missing_section": (lambda h, s: s.pop("tensor fc.bias") and h["sections"].pop("tensor fc.bias"), "fc.bias"),
    "alias_to_nothing": (field("aliases", "out.weight", value="x"), "aliases: 'out.weight' can't stand for 'x'"),
    "alias_of_a_tensor": (field("aliases", "fc.bias", value="embed.weight"), "aliases: 'fc.bias' can't"),
    "alias_of_a_list": (field("aliases", "out.weight", value=[]), "aliases: 'out.weight' can't"),
    "missing_alias": (lambda h, s: h["aliases"].pop("out.weight"), "doesn't fit the model: missing out.weight"),
    "other_format": (field("format", value="zip"), "header: expected format 'torch_csb.compressed'"),
    "newer_version": (field("version", value=2), "version: expected 1, got 2; a newer torch_csb"),
    "version_of_text": (field("version", value="1"), "version: expected 1, got '1'"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused(path, case):
    change, message = FORGED[case]
    save_compressed(sparse_net(bits=4), path)
    header, stored = parts_of(path)
    change(header, stored)
    forge(path, header, stored)
    for model in (sparse_net(0.7), Net().eval()):
        refused(model, path, state_of(model), message)


@pytest.mark.parametrize("text", [b"", b"[", b"[1]", b"\xff\xfe", b"[" * 100000, b'{"version": 1}', b"1" * 5000])
def test_a_header_that_is_no_header(path, text):
    path.write_bytes(struct.pack("<8sII", b"torchcsb", len(text), zlib.crc32(text)) + text)
    model = sparse_net()
    refused(model, path, state_of(model), "header: expected")


def test_a_model_that_does_not_fit_is_told_so(path):
    save_compressed(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), path)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    refused(
        model, path, state_of(model), "doesn't fit the model: missing c.weight, c.bias; unexpected b.weight, b.bias"
    )
    for content, message in ((b"", "not a file of save_compressed"), (b"PK\x03\x04" * 9, "not a file of")):
        path.write_bytes(content)
        refused(model, path, state_of(model), message)


# What it is for.


def test_four_bits_cost_at_most_half_a_point_on_digits(path):
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = (torch.from_numpy(array) for array in datasets.load_digits(return_X_y=True))
    x, order = images.float() / 16, torch.randperm(len(labels))
    train, test = order[:1000], order[1000:]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def fit(epochs, lr, after_step=lambda: None):
        optimizer = torch.optim.Adam(model.parameters(), lr)
        for _ in range(epochs):
            for picked in train[torch.randperm(len(train))].split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[picked]), labels[picked]).backward()
                optimizer.step()
                after_step()

    def accuracy():
        with torch.no_grad():
            return 100 * (model(x[test]).argmax(1) == labels[test]).double().mean().item()

    fit(25, 2e-3)
    for layer in (model[0], model[2]):
        weight = layer.weight.data
        weight *= weight.abs() > weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values
    sparsify_(model, min_sparsity=0)
    fit(25, 2e-3)
    before = accuracy()
    sharing = share_(model, 4)
    fit(10, 2e-4, sharing.step)
    sharing.finish()
    sizes = save_compressed(model, path)
    fresh = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    load_compressed(fresh, path)
    assert_same_state(state_of(fresh), state_of(model))
    after = accuracy()
    print(f"accuracy {before:.2f} % at 32 bits, {after:.2f} % at 4; {sizes}")
    assert before > 90 and after >= before - 0.5
    assert sizes.dense > sizes.csb > sizes.codes > sizes.file
