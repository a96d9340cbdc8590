"""Files of torch.save."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read(path: Path) -> dict[str, Any]:
    """The state_dict in ``path``, loaded with ``weights_only=True``; changed bytes are found by the archive's crc32.

    Raises:
        ValueError: the file is damaged, holds objects that could run code, or is no state_dict.
    """
    broken = _broken_record(path)
    if broken is not None and "/data/" not in broken:
        raise ValueError(f"record {broken!r}: its crc32 doesn't hold; the file was changed after it was saved")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).split("\n")[0]
        raise ValueError(f"not a checkpoint of tensors alone, which is all that is read safely: {first}") from error
    # Damage shows in many ways inside torch.load, also as KeyError or IndexError.
    except Exception as error:
        raise ValueError(f"not a complete file of torch.save: {type(error).__name__}: {error}") from error
    state = state_dict_of(loaded)
    if broken is not None:
        name = _name_of_record(state, broken)
        raise ValueError(f"{name}: its crc32 doesn't hold; the file was changed after it was saved")
    return state


def state_dict_of(loaded: object) -> dict[str, Any]:
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"expected a state_dict of names and tensors, got {type(loaded).__name__}")
    inner = [name for name, value in loaded.items() if isinstance(value, Mapping)]
    if inner and not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"expected a state_dict, got an object that holds others: {', '.join(map(repr, inner[:8]))}")
    return dict(loaded)


def _broken_record(path: Path) -> str | None:
    """The first record whose bytes changed. A checksum of 0 is one that torch.save was told not to compute."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:
                    try:
                        with archive.open(record) as file:
                            while file.read(1 << 20):
                                pass
                    except (zipfile.BadZipFile, EOFError):
                        return record.filename
    except Exception as error:
        raise ValueError(f"not a complete file of torch.save: {error}") from error
    return None


def _name_of_record(state: Mapping[str, Any], record: str) -> str:
    """torch.save numbers storages as it meets them."""
    storages: dict[int, str] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            storages.setdefault(value.untyped_storage()._cdata, name)
    number = record.rpartition("/")[2]
    names = list(storages.values())
    return names[int(number)] if number.isdecimal() and int(number) < len(names) else f"record {record!r}"
