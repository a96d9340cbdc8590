"""A thousand damaged files and more: the error names the tensor, and model and optimizer keep every bit."""

from __future__ import annotations

import random
import re
import zipfile
from collections import Counter

import pytest
import torch
from damaged_cases import (
    Damage,
    SafetensorsFile,
    Target,
    assert_works,
    damaged_state,
    flip,
    good_net,
    safetensors_damage,
    saved,
)
from small_net import Net, sparse_net

from torch_csb import CSBLinear, CSBMatrix, load_into, relayout_
from torch_csb.nn._layer import CSBLayer


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def targets(device):
    """A sparse model of another pattern, and a dense one whose layers would be replaced."""
    return [Target(sparse_net(0.6), device), Target(Net().eval(), device)]


def names_one_of(message: str, damage: Damage) -> bool:
    return any(re.search(rf"(^|[ '\"]){re.escape(name)}\b", message) for name in damage.names)


def test_a_thousand_damaged_files_are_refused_by_name(device, path):
    good, kinds = saved(good_net(), path), Counter()
    models = targets(device)
    for i, damage in enumerate(safetensors_damage(good, seed=0, count=1000)):
        path.write_bytes(damage.data)
        target = models[i % 2]
        with pytest.raises(ValueError) as error:
            load_into(target.model, path)
        message = str(error.value)
        assert message.startswith(f"{path}: "), damage.kind
        assert names_one_of(message.removeprefix(f"{path}: "), damage), (damage.kind, damage.names, message)
        target.assert_untouched(message)
        kinds[damage.kind] += 1
    assert sum(kinds.values()) == 1000 and len(kinds) == 10 and min(kinds.values()) > 50, kinds
    path.write_bytes(good)
    for target in models:
        load_into(target.model, path)
        assert torch.equal(target.model.fc.values.cpu(), good_net().fc.values)


def test_the_same_seed_makes_the_same_files(path):
    good = saved(good_net(), path)
    assert saved(good_net(), path) == good
    first, again, other = (list(safetensors_damage(good, seed, 200)) for seed in (3, 3, 4))
    assert first == again and first != other


def with_header(path, change):
    """The same file with other JSON in its header."""
    file = SafetensorsFile(path.read_bytes())
    change(file.header)
    path.write_bytes(file.rebuilt(file.header))


@pytest.mark.parametrize("key", ["format", "format_version", "aliases", "shapes", "crc32", "crc32_of_metadata"])
@pytest.mark.parametrize("way", ["renamed", "changed", "removed"])
def test_a_change_in_any_key_of_the_metadata_is_found(path, key, way):
    saved(good_net(), path)
    target = Target(sparse_net(0.6))

    def change(header):
        text = header["__metadata__"].pop(key)
        if way != "removed":
            header["__metadata__"][f"{key}x" if way == "renamed" else key] = text if way == "renamed" else f"{text} "

    with_header(path, change)
    with pytest.raises(ValueError, match="model.safetensors: metadata: "):
        load_into(target.model, path)
    target.assert_untouched((key, way))


@pytest.mark.parametrize("field, value", [("dtype", "I32"), ("shape", [48, 1]), ("shape", [1, 48])])
def test_the_same_bytes_as_something_else_are_found(path, field, value):
    saved(good_net(), path)
    with_header(path, lambda header: header["fc.bias"].update({field: value}))
    with pytest.raises(ValueError, match="fc.bias: expected crc32"):
        load_into(sparse_net(0.6), path)


def test_a_tensor_that_was_added_is_found(path):
    saved(good_net(), path)
    file = SafetensorsFile(path.read_bytes())
    path.write_bytes(file.with_tensors([*((name, name) for name in file.tensors), ("extra", "fc.bias")]))
    with pytest.raises(ValueError, match="extra: expected no such tensor, got one; the file was changed"):
        load_into(sparse_net(0.6), path, strict=False)


def test_damage_of_a_file_without_checksums_is_refused_or_leaves_valid_patterns(device, path):
    """As far as meaning goes: a value can't be told from another, an index that is in its place is one."""
    good, outcome = saved(good_net(), path, checksums=False), Counter()
    load_into(sparse_net(0.6), path)
    models = targets(device)
    for i, damage in enumerate(safetensors_damage(good, seed=1, count=1000)):
        path.write_bytes(damage.data)
        target = models[i % 2]
        try:
            load_into(target.model, path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), error
            target.assert_untouched(error)
            outcome[damage.kind, "refused"] += 1
        else:
            assert_works(target.model, damage.kind)
            models[i % 2] = targets(device)[i % 2]
            outcome[damage.kind, "taken"] += 1
    for kind in ("cut", "missing", "missing entry", "doubled name"):
        assert outcome[kind, "refused"] > 50 and not outcome[kind, "taken"], outcome
    assert outcome["data flip", "refused"] > 20 and outcome["data flip", "taken"] > 20, outcome


def test_every_bit_of_the_index_tensors(path):
    """Each in turn, without checksums: refused by the checks of meaning, or a valid pattern."""
    weight = torch.tensor([[1.0, 0, 2, 0, 3], [0, 0, 4, 5, 0], [6, 7, 0, 0, 8]])
    layer = CSBLinear(CSBMatrix.from_dense(weight, block_size=16))
    file = SafetensorsFile(saved(layer, path, checksums=False))
    outcome = Counter()
    for name in ("blk_ptr", "blk_pad", "layout", "codes"):
        begin, end = file.span(name)
        for bit in range(8 * begin, 8 * end):
            path.write_bytes(flip(file.data, bit))
            target = CSBLinear.from_dense(torch.nn.Linear(5, 3, bias=False), block_size=32)
            try:
                load_into(target, path)
            except ValueError as error:
                assert re.search(r": (blk_ptr|blk_pad|layout|codes|values): ", str(error)), error
                outcome[name, "refused"] += 1
            else:
                w = target.matrix
                places = set(zip(w.row_ind.tolist(), w.col_ind.tolist(), strict=True))
                assert len(places) == 8 and all(row < 3 and col < 5 for row, col in places), (name, bit)
                outcome[name, "taken"] += 1
    # Two offsets, a count and four fields; of a code's 16 bits, those that move an entry to a free place are taken.
    assert [outcome[name, "refused"] for name in ("blk_ptr", "blk_pad", "layout")] == [64, 8, 128]
    assert outcome["codes", "refused"] + outcome["codes", "taken"] == 8 * 16 and outcome["codes", "taken"] > 2


def test_a_flipped_bit_of_a_bitmap_is_refused(path):
    """One more or one less than blk_ptr says, or one outside the matrix; of the other arrays as with codes."""
    weight = torch.tensor([[1.0, 0, 2, 0, 3], [0, 0, 4, 5, 0], [6, 7, 0, 0, 8]])
    layer = CSBLinear(CSBMatrix.from_dense(weight, encoding="bitmap"))
    file, draw = SafetensorsFile(saved(layer, path, checksums=False)), random.Random(3)
    target = CSBLinear.from_dense(torch.nn.Linear(5, 3, bias=False), block_size=32)
    before = target.to_dense().weight
    for name, count in (("blk_ptr", 64), ("blk_pad", 8), ("layout", 128), ("codes", 400)):
        begin, end = file.span(name)
        for bit in draw.sample(range(8 * begin, 8 * end), count):
            path.write_bytes(flip(file.data, bit))
            with pytest.raises(ValueError, match=r": (blk_ptr|blk_pad|layout|codes|values): "):
                load_into(target, path)
    assert torch.equal(target.to_dense().weight, before)
    path.write_bytes(file.data)
    load_into(target, path)
    assert torch.equal(target.to_dense().weight, weight)


def test_moved_bits_of_a_bitmap_are_refused_or_a_pattern(path):
    model = sparse_net(0.7)
    relayout_(model, encoding="bitmap")
    good, outcome = saved(model, path, checksums=False), Counter()
    target = Target(sparse_net(0.6))
    for damage in safetensors_damage(good, seed=5, count=300):
        path.write_bytes(damage.data)
        try:
            load_into(target.model, path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), error
            target.assert_untouched(error)
            outcome["refused"] += 1
        else:
            assert_works(target.model, damage.kind)
            target = Target(sparse_net(0.6))
            outcome["taken"] += 1
    assert min(outcome["refused"], outcome["taken"]) > 20, outcome


def test_damaged_files_of_torch_save_are_refused_or_right(device, tmp_path):
    """The archive's own checksums; a flip in its unused bytes changes nothing."""
    path, outcome, draw = tmp_path / "model.pt", Counter(), random.Random(2)
    expected = good_net().state_dict()
    torch.save(expected, path)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: (info.header_offset, info.file_size) for info in archive.infolist()}
    borders = sorted({offset for offset, _ in records.values()})
    models = targets(device)
    damaged = [("cut", good[:at]) for border in borders for at in (border, border + 1, border + 40)]
    damaged += [("flip", flip(good, draw.randrange(8 * len(good)))) for _ in range(400)]
    for i, (kind, data) in enumerate(damaged):
        path.write_bytes(data)
        target = models[i % 2]
        try:
            load_into(target.model, path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: "), error
            target.assert_untouched(error)
            outcome[kind, "refused"] += 1
        else:
            state = target.model.state_dict()
            assert all(torch.equal(state[name].cpu(), tensor) for name, tensor in expected.items())
            models[i % 2] = targets(device)[i % 2]
            outcome[kind, "right"] += 1
    assert not outcome["cut", "right"] and outcome["flip", "refused"] > 100, outcome


def test_a_changed_tensor_in_a_file_of_torch_save_is_named(tmp_path):
    path, model = tmp_path / "model.pt", good_net()
    state = model.state_dict()
    for name in ("fc.values", "fc.codes", "norm.running_mean", "embed.weight"):
        torch.save(state, path)
        data = bytearray(path.read_bytes())
        at = bytes(data).index(bytes(state[name].flatten().view(torch.uint8).tolist()))
        data[at] ^= 4
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"model.pt: {name}: its crc32 doesn't hold"):
            load_into(model, path)


@pytest.mark.parametrize("way", ["load_into", "load_state_dict", "assign"])
def test_a_thousand_damaged_state_dicts(device, way):
    """What torch.load lets through. load_state_dict keeps each CSB layer whole, load_into the whole model."""
    expected, outcome, draw = good_net().state_dict(), Counter(), random.Random(5)
    target = Target(sparse_net(0.6), device)
    for _ in range(1000 if way == "load_into" else 300):
        kind, names, state = damaged_state(expected, draw)
        layers = {name: layer for name, layer in target.model.named_modules() if isinstance(layer, CSBLayer)}
        before = {name: [t.clone() for t in layer.state_dict().values()] for name, layer in layers.items()}
        try:
            if way == "load_into":
                load_into(target.model, state)
            else:
                target.model.load_state_dict(state, assign=way == "assign")
        except (ValueError, RuntimeError) as error:
            # The arrays of a layer may contradict each other; which of them is wrong, nothing can tell.
            parts = [name.rpartition(".")[0] + "." for name in names]
            assert any(part in str(error) for part in parts), (kind, names, error)
            outcome["refused"] += 1
            if way == "load_into":
                target.assert_untouched(error)
                continue
            for name, layer in layers.items():
                if re.search(rf"\b{name}\.(values|codes|blk_ptr|blk_pad|layout|bias): ", str(error)):
                    now = list(layer.state_dict().values())
                    assert all(torch.equal(a, b) for a, b in zip(now, before[name], strict=True)), (name, error)
                    outcome["layer kept"] += 1
        else:
            assert_works(target.model, (kind, names))
            outcome["taken"] += 1
        target = Target(sparse_net(0.6), device)
    assert min(outcome["refused"], outcome["taken"]) > 50, outcome
    assert way == "load_into" or outcome["layer kept"] > 50, outcome


def test_objects_in_a_checkpoint_are_refused(tmp_path):
    path, target = tmp_path / "model.pt", Target(sparse_net(0.6))
    torch.save(good_net(), path)
    with pytest.raises(ValueError, match="model.pt: not a checkpoint of tensors alone"):
        load_into(target.model, path)
    torch.save({"epoch": 3, "state_dict": good_net().state_dict()}, path)
    with pytest.raises(
        ValueError, match="model.pt: expected a state_dict, got an object that holds others: 'state_dict'"
    ):
        load_into(target.model, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="model.pt: expected a state_dict of names and tensors, got list"):
        load_into(target.model, path)
    for wrong, message in (
        ([1.0], "embed.weight: expected a tensor, got list"),
        (
            torch.zeros(10, 48).to_sparse(),
            "embed.weight: expected torch.strided with data, got torch.sparse_coo on cpu",
        ),
        (
            torch.zeros(10, 48, device="meta"),
            "embed.weight: expected torch.strided with data, got torch.strided on meta",
        ),
    ):
        with pytest.raises(ValueError, match=f"state_dict: {message}"):
            load_into(target.model, {**good_net().state_dict(), "embed.weight": wrong})
    target.assert_untouched("every error above")


def test_a_file_whose_checksums_were_left_out_is_read(tmp_path):
    path = tmp_path / "model.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(good_net().state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    model = sparse_net(0.6)
    load_into(model, path)
    assert torch.equal(model.fc.values, good_net().fc.values)
    torch.save(good_net().state_dict(), path, _use_new_zipfile_serialization=False)
    load_into(sparse_net(0.6), path)
