"""The folders that other libraries save models in: one file, or several with an index."""

from __future__ import annotations

import json
from pathlib import Path

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def safetensors_files(path: Path) -> list[Path]:
    """``path`` itself, or, of a folder as ``save_pretrained`` makes it, the files that hold its model.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: its index is damaged.
    """
    if not path.is_dir():
        return [path]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    index = path / _INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{path}: expected {_SINGLE} or {_INDEX} in this folder, got neither")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({Path(name).name for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected a weight_map from tensors to files: {error!r}") from error
    return [path / name for name in files]
