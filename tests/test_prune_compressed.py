"""Compressed files: the round trip is exact, and each step makes the model smaller."""

from __future__ import annotations

import pytest
import torch
from cases import packing
from compressed_cases import assert_same_state, layer_of, state_of
from small_net import Net, sparse_net
from torch import nn

from torch_csb import CSBMatrix, sparsify_
from torch_csb.prune import _sections, load_compressed, save_compressed, share_


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.csbz"


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
@pytest.mark.parametrize("block_size", [2, 16, 256, "bitmap"])
def test_every_shape_dtype_and_block_size(path, shape, dtype, block_size):
    m, k, density = SHAPES[shape]
    dense = torch.randn(m, k).to(dtype)
    model = layer_of(CSBMatrix.from_dense(dense, torch.rand(m, k) < density, **packing(block_size)))
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
