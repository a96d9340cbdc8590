"""Damaged files, made from a good one by a seed, and what a model and its optimizer must keep."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from small_net import sparse_net
from torch import Tensor, nn

from torch_csb import save
from torch_csb.nn._layer import CSBLayer
from torch_csb.validate import validate_arrays


class Damage(NamedTuple):
    kind: str
    data: bytes
    names: tuple[str, ...]  # one of them must stand in the error


class Target:
    """A model with an optimizer in the midst of training, and a copy to compare with."""

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.model(torch.randn(2, 8, 6, 6, device=device)).square().sum().backward()
        self.optimizer.step()
        self._before = self._everything()
        self._kept = [copy.deepcopy(tensor) for tensor in self._before]
        self._text = str(self.model)

    def _everything(self) -> list[Tensor]:
        parameters = list(self.model.parameters())
        moments = [t for p in parameters for t in self.optimizer.state[p].values() if isinstance(t, Tensor)]
        return [*parameters, *(p.grad for p in parameters if p.grad is not None), *self.model.buffers(), *moments]

    def assert_untouched(self, what: object) -> None:
        now = self._everything()
        assert str(self.model) == self._text and len(now) == len(self._before), what
        for tensor, before, kept in zip(now, self._before, self._kept, strict=True):
            assert tensor is before, what
            assert tensor.dtype == kept.dtype and tensor.device == kept.device and torch.equal(tensor, kept), what


def assert_works(model: nn.Module, what: object) -> None:
    """Every pattern is valid, and a step forward and back reads it all."""
    for layer in model.modules():
        if isinstance(layer, CSBLayer):
            w = layer.matrix
            validate_arrays(w.values, w.codes, w.blk_ptr, w.blk_pad, m=w.m, k=w.k, layout=w.layout)
            dense = w.to_dense()
            assert int((dense != 0).sum()) <= w.nnz, what
            # A changed value may be infinite, so the product is compared on values that are not.
            ones = w.with_values(w.is_entry.to(w.dtype))
            x = torch.ones(w.k, 3, dtype=w.dtype, device=w.device)
            assert torch.equal(ones @ x, ones.to_dense() @ x), what
    device = next(model.parameters()).device
    model(torch.randn(2, 8, 6, 6, device=device)).sum().backward()


def good_net() -> nn.Module:
    torch.manual_seed(7)
    return sparse_net(0.8)


class SafetensorsFile:
    """The parts of a safetensors file, to be put together wrongly."""

    def __init__(self, data: bytes) -> None:
        (length,) = struct.unpack("<Q", data[:8])
        self.start = 8 + length
        self.data = data
        self.header: dict[str, dict] = json.loads(data[8 : self.start])
        self.tensors = [name for name in self.header if name != "__metadata__"]
        self.tensors.sort(key=lambda name: self.header[name]["data_offsets"])

    def span(self, name: str) -> tuple[int, int]:
        begin, end = self.header[name]["data_offsets"]
        return self.start + begin, self.start + end

    def rebuilt(self, header: dict[str, dict] | str, body: bytes | None = None) -> bytes:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + (self.data[self.start :] if body is None else body)

    def with_tensors(self, chosen: list[tuple[str, str]]) -> bytes:
        """A well-formed file of (name, name of the tensor whose dtype, shape and bytes it gets)."""
        header, body = {"__metadata__": self.header["__metadata__"]}, b""
        for name, source in chosen:
            begin, end = self.span(source)
            offsets = [len(body), len(body) + end - begin]
            header[name] = {**self.header[source], "data_offsets": offsets}
            body += self.data[begin:end]
        return self.rebuilt(header, body)


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def safetensors_damage(data: bytes, seed: int, count: int) -> Iterator[Damage]:
    """``count`` damaged files: first a cut at and beside every border, then kinds in turn."""
    file, draw = SafetensorsFile(data), random.Random(seed)
    made = 0
    for damage in _cuts(file):
        made += 1
        yield damage
    kinds: list[Callable[[SafetensorsFile, random.Random], Damage | None]] = [
        _header_flip,
        _data_flip,
        _swapped_data,
        _swapped_entries,
        _duplicated,
        _doubled_name,
        _copied_over,
        _missing,
        _missing_entry,
    ]
    while made < count:
        damage = kinds[made % len(kinds)](file, draw)
        if damage is not None and damage.data != data:
            made += 1
            yield damage


def _cuts(file: SafetensorsFile) -> Iterator[Damage]:
    for at in (0, 1, 7, 8, 9, file.start - 1, file.start):
        yield Damage("cut", file.data[:at], ("header", file.tensors[0]))
    for name in file.tensors:
        begin, end = file.span(name)
        for at in {begin, (begin + end) // 2, end - 1} - {end}:
            yield Damage("cut", file.data[:at], (name,))
    yield Damage("cut", file.data + b"\0", ("end of the file",))


def _header_flip(file: SafetensorsFile, draw: random.Random) -> Damage:
    anything = ("header", "metadata", *file.tensors)
    return Damage("header flip", flip(file.data, draw.randrange(8 * file.start)), anything)


def _data_flip(file: SafetensorsFile, draw: random.Random) -> Damage:
    # A tensor first, or the largest would be hit nearly always.
    name = draw.choice(file.tensors)
    begin, end = file.span(name)
    return Damage("data flip", flip(file.data, draw.randrange(8 * begin, 8 * end)), (name,))


def _swapped_data(file: SafetensorsFile, draw: random.Random) -> Damage | None:
    a, b = draw.sample(file.tensors, 2)
    (a0, a1), (b0, b1) = sorted((file.span(a), file.span(b)))
    if a1 - a0 != b1 - b0:
        return None
    data = file.data
    return Damage("swapped data", data[:a0] + data[b0:b1] + data[a1:b0] + data[a0:a1] + data[b1:], (a, b))


def _swapped_entries(file: SafetensorsFile, draw: random.Random) -> Damage:
    a, b = draw.sample(file.tensors, 2)
    header = {**file.header, a: file.header[b], b: file.header[a]}
    return Damage("swapped entries", file.rebuilt(header), (a, b))


def _duplicated(file: SafetensorsFile, draw: random.Random) -> Damage:
    """One tensor stands where another should."""
    a, b = draw.sample(file.tensors, 2)
    chosen = [(name, b if name == a else name) for name in file.tensors]
    return Damage("duplicated", file.with_tensors(chosen), (a,))


def _doubled_name(file: SafetensorsFile, draw: random.Random) -> Damage:
    a, b = draw.sample(file.tensors, 2)
    text = json.dumps(file.header).replace(json.dumps(a), json.dumps(b), 1)
    return Damage("doubled name", file.rebuilt(text), (a, b))


def _copied_over(file: SafetensorsFile, draw: random.Random) -> Damage:
    """A run of bytes is replaced by a run from elsewhere, as a faulty disk or transfer does."""
    length = draw.randint(1, 64)
    begin = draw.randrange(file.start, len(file.data) - length)
    source = draw.randrange(file.start, len(file.data) - length)
    data = file.data[:begin] + file.data[source : source + length] + file.data[begin + length :]
    hit = [name for name in file.tensors if file.span(name)[0] < begin + length and begin < file.span(name)[1]]
    return Damage("copied over", data, tuple(hit))


def _missing(file: SafetensorsFile, draw: random.Random) -> Damage:
    a = draw.choice(file.tensors)
    return Damage("missing", file.with_tensors([(name, name) for name in file.tensors if name != a]), (a,))


def _missing_entry(file: SafetensorsFile, draw: random.Random) -> Damage:
    """The header lacks a tensor whose bytes are there: the next one, or the end, stands wrongly."""
    at = draw.randrange(len(file.tensors))
    a, after = file.tensors[at], file.tensors[at + 1 : at + 2] or ["end of the file"]
    return Damage("missing entry", file.rebuilt({k: v for k, v in file.header.items() if k != a}), (a, *after))


def saved(model: nn.Module, path: Path, *, checksums: bool = True) -> bytes:
    """What torch_csb.save writes, or what a version without checksums would have written.

    safetensors orders the metadata differently in each process. Here it is sorted, so that a seed's damage is the same.
    """
    save(model, path)
    file = SafetensorsFile(path.read_bytes())
    metadata = sorted(file.header["__metadata__"].items())
    kept = {key: text for key, text in metadata if checksums or not key.startswith("crc32")}
    data = file.rebuilt({"__metadata__": kept, **{name: file.header[name] for name in file.tensors}})
    path.write_bytes(data)
    return data


def damaged_state(state: dict[str, Tensor], draw: random.Random) -> tuple[str, tuple[str, ...], dict[str, Tensor]]:
    """(kind, names of what is damaged, state_dict): the damage that a file of torch.save carries through torch.load.

    All names of a tensor meet the same damage, as they do in a file.
    """
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    clones = {at: state[names[0]].clone() for at, names in groups.items()}
    one, other = draw.sample(list(groups), 2)
    kind = draw.choice(("flip", "flip", "flip", "cut", "swapped", "duplicated", "missing"))
    if kind == "flip":
        flat = clones[one].view(-1).view(torch.uint8)
        bit = draw.randrange(8 * flat.numel())
        flat[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        clones[one] = clones[one].view(-1)[: draw.randrange(clones[one].numel())]
    elif kind == "swapped":
        clones[one], clones[other] = clones[other], clones[one]
    elif kind == "duplicated":
        clones[one] = clones[other].clone()
    else:
        del clones[one]
    hit = groups[one] + (groups[other] if kind == "swapped" else [])
    damaged = {name: clones[at] for at, names in groups.items() if at in clones for name in names}
    return kind, tuple(hit), damaged
