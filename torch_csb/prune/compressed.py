"""Models in entropy-coded files: values as codes into a codebook, indices as gaps, both Huffman-coded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_csb._progress import progress as progress_bar
from torch_csb.nn._layer import CSBLayer
from torch_csb.nn._restore import prepare
from torch_csb.nn._state import ARRAYS
from torch_csb.prune import _sections
from torch_csb.prune._entries import DTYPES, decode, encode, from_bytes, name_of, nbytes, section, to_bytes

_PROGRESS_AFTER_S = 1.0


class CompressedSizes(NamedTuple):
    """Bytes of one model, everything that is no CSB layer counted in its own dtype.

    Attributes:
        dense: CSB layers as dense float32 weights.
        csb: CSB layers as values, codes, block pointers, padding counts and layout.
        codes: the same, with the values of shared layers as ⌈log2 n⌉-bit codes and a codebook of n values.
        file: the entropy-coded file, with codebooks, indices, Huffman tables, checksums and header.
    """

    dense: int
    csb: int
    codes: int
    file: int


def save_compressed(model: nn.Module, path: str | os.PathLike[str], *, progress: bool | None = None) -> CompressedSizes:
    """Writes the state_dict of ``model`` to a small file that :func:`load_compressed` restores bit for bit.

    The values of a CSB layer with at most 256 different ones (see :func:`share_`) are stored as codes and a codebook,
    others as raw bytes; its indices as the gaps between its entries in row-major order, padding left out; all other
    tensors as raw bytes. Each of these is Huffman-coded where that makes it smaller. A tensor under several names is
    stored once. The file appears under ``path`` when it is complete; until then an older file there stays as it was.

    Args:
        progress: a bar on stderr; None shows it on a terminal when the work takes a while.

    Raises:
        TypeError: the state_dict holds something other than plain tensors.
        ValueError: a tensor without data (meta device).
        OSError: the file can't be written.

    Source: Han, Mao, Dally, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
    Huffman Coding", ICLR 2016.
    """
    state = dict(model.state_dict())
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or name_of(tensor.dtype) not in DTYPES:
            kind = f"{tensor.layout} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{key}: expected a dense tensor of {', '.join(DTYPES)}, got {kind}")
        if tensor.is_meta:
            raise ValueError(f"{key}: expected data, got a tensor on the meta device")
    fields: dict[str, Any] = {"layers": {}, "tensors": {}, "aliases": {}}
    sections: dict[str, bytes] = {}
    dense = csb = codes = 0
    first: dict[int, str] = {}
    layers = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, CSBLayer)]
    delay = 0.0 if progress else _PROGRESS_AFTER_S
    for name, layer in progress_bar(layers, "compressing", "layers", show=progress, delay=delay):
        size = sum(nbytes(state.pop(_key(name, array))) for array in ARRAYS)
        if (original := first.setdefault(id(layer), name)) != name:
            fields["aliases"].update({_key(name, array): _key(original, array) for array in ARRAYS})
            continue
        record, parts = encode(layer.matrix)
        fields["layers"][name] = record
        sections.update({section(name, part): data for part, data in parts.items()})
        dense, csb = dense + 4 * layer.m * layer.k, csb + size
        codes += size - nbytes(layer.values) + _bytes_as_codes(record, parts) if record["codebook"] else size
    seen: dict[tuple[object, ...], str] = {}
    for key, tensor in state.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        if tensor.numel() and (original := seen.setdefault(identity, key)) != key:
            fields["aliases"][key] = original
            continue
        fields["tensors"][key] = [name_of(tensor.dtype), list(tensor.shape)]
        sections[f"tensor {key}"] = to_bytes(tensor)
        dense, csb, codes = (total + nbytes(tensor) for total in (dense, csb, codes))
    return CompressedSizes(dense, csb, codes, _sections.write(Path(path), fields, sections))


def load_compressed(model: nn.Module, path: str | os.PathLike[str], *, progress: bool | None = None) -> None:
    """Reads a file of :func:`save_compressed` into ``model``, expanding codes once.

    Every layer takes what the file has for it: a CSB layer adopts the file's pattern, and an ``nn.Linear`` or 1×1
    ``nn.Conv2d`` for which the file holds a CSB layer is replaced by one, in place. The model's dtypes and devices
    stay; make the optimizer anew where a pattern changed. Everything is checked first: on an error the model keeps
    every bit. What is allocated grows with the model and with 8 times the file, whatever sizes the file declares.

    Args:
        progress: a bar on stderr; None shows it on a terminal when the work takes a while.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered or of a newer version, or doesn't fit the model; it names the file,
            the section or tensor, and what is wrong.
    """
    path = Path(path)
    try:
        prepared = prepare(model, _read(model, path, progress))
        problems = (("missing", prepared.missing), ("unexpected", prepared.unexpected))
        if lists := "; ".join(f"{what} {', '.join(names)}" for what, names in problems if names):
            raise ValueError(f"doesn't fit the model: {lists}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    prepared.apply()


def _read(model: nn.Module, path: Path, progress: bool | None) -> dict[str, Tensor]:
    """The file's state_dict."""
    sections = _sections.Sections(path)
    layers, plain, aliases = (_sections.table(sections.header, key) for key in ("layers", "tensors", "aliases"))
    modules = dict(model.named_modules(remove_duplicate=False))
    expected = {name: _size(modules.get(name), name) for name in layers}
    tensors: dict[str, Tensor] = {}
    delay = 0.0 if progress else _PROGRESS_AFTER_S
    for name in progress_bar(list(layers), "expanding", "layers", show=progress, delay=delay):
        matrix = decode(name, layers[name], sections, *expected[name])
        arrays = {array: getattr(matrix, array) for array in ARRAYS[:-1]}
        arrays["layout"] = matrix.layout.to_tensor()
        tensors.update({_key(name, array): tensor for array, tensor in arrays.items()})
    for key, record in plain.items():
        if key in tensors:
            raise ValueError(f"header: tensor {key!r}: belongs to a CSB layer already")
        tensors[key] = _read_tensor(key, record, sections)
    sections.finish()
    stored = dict(tensors)
    for alias, key in aliases.items():
        if alias in tensors or not isinstance(key, str) or key not in stored:
            raise ValueError(f"header: aliases: {alias!r} can't stand for {key!r:.80}")
        tensors[alias] = stored[key]
    return tensors


def _size(module: nn.Module | None, name: str) -> tuple[int, int]:
    """Rows and columns of the model's own layer: what a file says about them must never decide what is allocated."""
    if isinstance(module, CSBLayer):
        return module.m, module.k
    own = {} if module is None else {**module._parameters, **module._buffers}
    weight = own.get("weight", own.get("weight_orig"))
    if weight is None or weight.dim() < 2:
        raise ValueError(f"header: layer {name!r}: the file holds a CSB layer, and the model has no weight there")
    return weight.shape[0], weight.shape[1]


def _read_tensor(key: str, record: object, sections: _sections.Sections) -> Tensor:
    dtype, shape = record if isinstance(record, list) and len(record) == 2 else (None, None)
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list):
        raise ValueError(f"header: tensor {key!r}: expected a dtype and a shape, got {record!r:.80}")
    data = from_bytes(sections.take(f"tensor {key}"), torch.uint8)
    if dtype == "bool" and bool((data > 1).any()):
        raise ValueError(f"section 'tensor {key}': expected bytes 0 and 1 for bool, got {int(data.max())}")
    try:
        return data.view(DTYPES[dtype]).view(shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"header: tensor {key!r}: {len(data)} bytes are no {dtype} of shape {shape!r:.80}") from error


def _bytes_as_codes(record: dict[str, Any], parts: dict[str, bytes]) -> int:
    bits = max(1, (record["codebook"] - 1).bit_length())
    return -(-record["nnz"] * bits // 8) + len(parts["codebook"])


def _key(name: str, array: str) -> str:
    return f"{name}.{array}" if name else array
