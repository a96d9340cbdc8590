"""A file's tensors by name, checked against everything but a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from torch_csb._files import checksums, zipped
from torch_csb._files.diagnosis import diagnose

FORMAT = "torch_csb"
FORMAT_VERSION = 1
# How files of torch.save begin: today's, and those of torch before 1.6. As the length of a safetensors header the first
# doesn't occur and the second is refused.
_MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
_SUFFIXES = (".pt", ".pth", ".bin")


class Contents(NamedTuple):
    """``tensors`` under every name (values of a torch.save file may be of other types); ``aliases`` from each further
    name of a tensor to the one under which it is stored; ``metadata`` as text."""

    tensors: dict[str, Any]
    aliases: dict[str, str]
    metadata: dict[str, str]


def read(path: Path) -> Contents:
    """Reads a safetensors file or a state_dict of torch.save.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of a newer format; it names the tensor, not the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic in _MAGIC or path.suffix in _SUFFIXES:
        return Contents(zipped.read(path), {}, {})
    return _read_safetensors(path)


def _read_safetensors(path: Path) -> Contents:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            checksums.verify_metadata(metadata, own=metadata.get("format") == FORMAT)
            _check_version(metadata)
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"not a complete safetensors file: {diagnose(path) or error}") from error
    checksums.verify_tensors(metadata, tensors)
    aliases = _aliases(metadata)
    for alias, name in aliases.items():
        if alias in tensors or name not in tensors:
            raise ValueError(f"metadata: {alias!r} can't stand for {name!r}")
    stored = dict(tensors)
    tensors.update({alias: stored[name] for alias, name in aliases.items()})
    return Contents(tensors, aliases, metadata)


def _check_version(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        return
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        newer = version.isdecimal() and int(version) > FORMAT_VERSION
        hint = "; a newer torch_csb wrote this file, please upgrade" if newer else ""
        raise ValueError(f"format_version: expected {FORMAT_VERSION}, got {version!r}{hint}")


def _aliases(metadata: Mapping[str, str]) -> dict[str, str]:
    if metadata.get("format") != FORMAT or "aliases" not in metadata:
        return {}
    try:
        aliases = json.loads(metadata["aliases"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"aliases: expected JSON, got {metadata['aliases'][:60]!r}") from error
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise ValueError(f"aliases: expected an object of names, got {type(aliases).__name__}")
    return aliases
