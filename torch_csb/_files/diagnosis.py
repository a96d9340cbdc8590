"""Which tensor of a safetensors file is damaged, for a message. The reader itself has refused the file already."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

_BITS = {"BOOL": 8, "BF16": 16, "C64": 64, **{f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)}}
_BITS |= {f"F{bits}": bits for bits in (16, 32, 64)}


def diagnose(path: Path) -> str:
    """What is wrong, beginning with the name of a tensor or ``header``; empty where nothing is found."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            return f"header: expected 8 bytes with its length, got {len(head)}; the file is truncated"
        (length,) = struct.unpack("<Q", head)
        if length > size - 8:
            return f"header: expected {length} bytes, got {size - 8}; the file is truncated or its first bytes changed"
        text = file.read(length)
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=list)
    except UnicodeDecodeError as error:
        return f"header: byte {error.start} is no UTF-8{_near(text, error.start)}"
    except (ValueError, RecursionError) as error:
        return f"header: not JSON: {error}{_near(text, getattr(error, 'pos', 0))}"
    if not isinstance(fields, list) or not all(isinstance(field, tuple) for field in fields):
        return "header: expected a JSON object"
    tensors = [(name, _record(record)) for name, record in fields if name != "__metadata__"]
    names = [name for name, _ in tensors]
    for name, record in tensors:
        if names.count(name) > 1:
            return f"header: {name}: stands there {names.count(name)} times"
        if (problem := _problem(record)) is not None:
            return f"header: {name}: {problem}"
    return _misplaced(tensors, size - 8 - length)


def _near(text: bytes, position: int) -> str:
    """The last tensor whose name stands before the damage."""
    before = text[:position].decode("utf-8", "replace")
    # Keys of tensors are the strings in front of an object.
    parts = before.split('":{"dtype"')
    return f", at or after tensor {parts[-2].rpartition(chr(34))[2]!r:.80}" if len(parts) > 1 else ""


def _record(record: object) -> dict[str, Any]:
    return dict(record) if isinstance(record, list) and all(isinstance(part, tuple) for part in record) else {}


def _problem(record: dict[str, Any]) -> str | None:
    if set(record) != {"dtype", "shape", "data_offsets"}:
        return f"expected a dtype, a shape and data_offsets, got {', '.join(map(str, record)) or 'none of them'}"
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            return f"{what}: expected a list of sizes, got {numbers!r:.80}"
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets: expected a begin and an end, got {offsets!r:.80}"
    # Rare dtypes are left to the reader's own message.
    if dtype in _BITS and math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        return f"expected {dtype} of shape {shape}, got {offsets[1] - offsets[0]} bytes"
    return None


def _misplaced(tensors: list[tuple[str, dict[str, Any]]], size: int) -> str:
    """Data must follow each other without a gap and fill the file."""
    end = 0
    for name, record in sorted(tensors, key=lambda item: item[1]["data_offsets"]):
        begin, stop = record["data_offsets"]
        if begin != end:
            return f"{name}: expected its data at byte {end}, the header says {begin}"
        if stop > size:
            return f"{name}: expected data up to byte {stop}, the file ends at {size}; it is truncated"
        end = stop
    return f"end of the file: expected {end} bytes of data, got {size}" if end != size else ""
