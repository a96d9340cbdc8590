"""Checksums in the metadata of a safetensors file: every changed bit of the file is found, and its tensor named.

``crc32`` is JSON from each tensor's name to the crc32 of its dtype, shape and bytes; ``crc32_of_metadata`` is that of
all other metadata, ``crc32`` among it. A file has both or none, so that no single damage can hide them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

TENSORS, METADATA = "crc32", "crc32_of_metadata"
KEYS = (TENSORS, METADATA)
_ALTERED = "the file was changed after it was saved; get it again, or save the model again"


def of_tensor(tensor: Tensor) -> str:
    """Of a strided host tensor."""
    kind = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return f"{zlib.crc32(data, kind):08x}"


def sealed(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata with the checksums added."""
    full = dict(metadata)
    full[TENSORS] = json.dumps({name: of_tensor(tensor) for name, tensor in tensors.items()}, sort_keys=True)
    full[METADATA] = _of_metadata(full)
    return full


def verify_metadata(metadata: Mapping[str, str], *, own: bool) -> None:
    """Checks what :func:`sealed` wrote into the metadata; a file without checksums passes.

    Args:
        own: the metadata calls the file one of this project.

    Raises:
        ValueError: it changed.
    """
    present = [key for key in KEYS if key in metadata]
    if not present or (len(present) == 1 and not own):
        return
    if len(present) == 1:
        absent = next(key for key in KEYS if key not in metadata)
        raise ValueError(f"metadata: {present[0]} came without {absent}; {_ALTERED}")
    rest = {key: text for key, text in metadata.items() if key != METADATA}
    if (found := _of_metadata(rest)) != metadata[METADATA]:
        raise ValueError(f"metadata: expected crc32 {metadata[METADATA]!r:.20}, got '{found}'; {_ALTERED}")


def verify_tensors(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Checks every tensor against metadata that :func:`verify_metadata` let pass.

    Raises:
        ValueError: naming the tensor that changed, is missing or is new.
    """
    if not all(key in metadata for key in KEYS):
        return
    expected = json.loads(metadata[TENSORS])
    for name in [*expected, *tensors]:
        if name not in tensors:
            raise ValueError(f"{name}: expected this tensor, got none; {_ALTERED}")
        if name not in expected:
            raise ValueError(f"{name}: expected no such tensor, got one; {_ALTERED}")
    for name, tensor in tensors.items():
        if (found := of_tensor(tensor)) != expected[name]:
            raise ValueError(f"{name}: expected crc32 {expected[name]}, got {found}; {_ALTERED}")


def _of_metadata(metadata: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode()):08x}"
