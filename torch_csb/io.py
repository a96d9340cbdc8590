"""Models in files. A file is written whole or not at all, and checked whole before it changes a model."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torch_csb._files import checksums
from torch_csb._files.folder import safetensors_files
from torch_csb._files.read import FORMAT, FORMAT_VERSION, read
from torch_csb.nn._deferred import meta_buffers
from torch_csb.nn._layer import CSBLayer
from torch_csb.nn._restore import prepare
from torch_csb.nn._shard import refuse_sharded

_RESERVED = ("format", "format_version", "aliases", "shapes", *checksums.KEYS)


class LoadResult(NamedTuple):
    """Names that the model has and the file lacks, and the other way round. Both are empty after a strict load."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the state_dict of ``model`` to a safetensors file, from any device.

    A tensor under several names (tied weights, shared modules) is stored once, and each has a checksum, by which
    :func:`load_into` finds changed bits. The file appears under ``path`` when it is complete; until then an older file
    there stays as it was.

    Args:
        model: a model, or a state_dict, such as ``torch_csb.distributed.full_state_dict`` gathers from all ranks.
        metadata: text to store beside the tensors; the keys ``format``, ``format_version``, ``aliases``, ``shapes``,
            ``crc32`` and ``crc32_of_metadata`` are taken.

    Raises:
        ValueError: a key of ``metadata`` is taken, a tensor has no data (meta device), or this rank holds only a shard
            of it.
        TypeError: ``metadata`` holds something other than text, or the state_dict something other than tensors.
        OSError: the file can't be written.
    """
    if isinstance(model, Mapping):
        save_state(model, {}, path, metadata)
        return
    layers = model.named_modules(remove_duplicate=False)
    shapes = {name: (layer.m, layer.k) for name, layer in layers if isinstance(layer, CSBLayer)}
    save_state(model.state_dict(), shapes, path, metadata)


def save_state(
    state: Mapping[str, object],
    shapes: Mapping[str, tuple[int, int]],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """:func:`save` for a state_dict without its model. ``shapes`` is (m, k) of each CSB layer in it."""
    path = Path(path)
    tensors, aliases = _distinct(state)
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    if aliases:
        header["aliases"] = json.dumps(aliases, sort_keys=True)
    if shapes:
        header["shapes"] = json.dumps(shapes, sort_keys=True)
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata: expected text for each key, got {key!r}: {type(value).__name__}")
        if key in _RESERVED:
            raise ValueError(f"metadata: the key {key!r} is taken by the format")
        header[key] = value
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # safetensors makes files that only their owner can read.
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        save_file(tensors, temporary, metadata=checksums.sealed(header, tensors))
        temporary.chmod(stat.S_IMODE(mode))
        with open(temporary, "rb") as file:
            # Without this a crash soon after could leave the new name with old or no data.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _distinct(state: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Host tensors that share no memory, and ``{alias: name}`` for those that are one tensor under two names."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}; safetensors holds nothing else")
        if tensor.is_meta:
            raise ValueError(f"{name}: expected data, got a tensor on the meta device")
        refuse_sharded(tensor, name)
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        host = tensor.to("cpu").contiguous()
        if host.untyped_storage().data_ptr() in storages:
            # Another view of memory that is already listed, which safetensors would refuse.
            host = host.clone()
        storages.add(host.untyped_storage().data_ptr())
        tensors[name] = host
    return tensors, aliases


def load_into(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    strict: bool = True,
    *,
    device: torch.device | str | None = None,
) -> LoadResult:
    """Reads a file of :func:`save`, or any other tensors with the model's names, into ``model``.

    Every layer takes what the source has for it: a CSB layer adopts its pattern, or packs a dense weight with its
    zeros; an ``nn.Linear`` or 1×1 ``nn.Conv2d`` for which the source holds a CSB layer is replaced by one, in place.
    The model's dtypes and devices stay. Parameters stay the same objects, but for replaced layers; make the optimizer
    anew where a pattern changed. Everything is checked first: on an error the model keeps every bit, which
    ``load_state_dict`` promises for each CSB layer but not for the model.

    A model built under ``torch.device("meta")`` gets its tensors here: each goes to ``device``, in the model's dtype
    and with its ``requires_grad``, and what was tied stays tied. Parameters are new objects then.

    Args:
        source: a safetensors file, a state_dict, or a file to which ``torch.save`` wrote one (read with
            ``weights_only=True``). A changed bit is found by the checksums of :func:`save` or of torch's archive; files
            without them are checked as far as their meaning goes. A folder of Hugging Face's ``save_pretrained`` will
            do, too, with one safetensors file or several and their index.
        strict: raise for missing and unexpected names too, instead of returning them.
        device: where tensors on the meta device go, by default torch's default device; others stay where they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of a newer format, or a tensor doesn't fit; it names file, tensor and what is
            wrong.
    """
    if isinstance(source, Mapping):
        where, tensors = "state_dict", source
    else:
        where, tensors = str(Path(source)), _read_all(Path(source))
    try:
        prepared = prepare(model, tensors, _target(device))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if strict and (prepared.missing or prepared.unexpected):
        problems = (("missing", prepared.missing), ("unexpected", prepared.unexpected))
        lists = "; ".join(f"{what} {', '.join(names)}" for what, names in problems if names)
        if lost := meta_buffers(model):
            lists += f"; no file holds {lost[0]}, a buffer with persistent=False: build it outside torch.device('meta')"
        raise ValueError(f"{where}: doesn't fit the model: {lists} (strict=False loads the rest)")
    prepared.apply()
    return LoadResult(prepared.missing, prepared.unexpected)


def _target(device: torch.device | str | None) -> torch.device:
    target = torch.get_default_device() if device is None else torch.device(device)
    if target.type == "meta":
        raise ValueError("device: expected one that holds data, got meta; call load_into outside torch.device('meta')")
    return target


def _read_all(path: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file in safetensors_files(path):
        try:
            found = read(file).tensors
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        for name in found:
            if name in tensors:
                raise ValueError(f"{file}: {name} is in another file of this folder too")
        tensors.update(found)
    return tensors
