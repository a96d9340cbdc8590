"""Compressed files that are cut, altered or forged: each is refused by name, and the model keeps every bit."""

from __future__ import annotations

import json
import random
import struct
import zlib

import pytest
from compressed_cases import assert_same_state, state_of
from small_net import Net, sparse_net
from torch import nn

from torch_csb.prune import load_compressed, save_compressed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.csbz"


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


def test_what_the_model_ties_needs_no_alias(path):
    good = sparse_net(bits=4)
    save_compressed(good, path)
    header, stored = parts_of(path)
    header["aliases"].pop("out.weight")
    forge(path, header, stored)
    model = sparse_net(0.7)
    load_compressed(model, path)
    assert model.out.weight is model.embed.weight
    assert_same_state(state_of(model), state_of(good))


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
