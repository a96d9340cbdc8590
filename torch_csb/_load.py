"""Loads the compiled operators into torch's dispatcher."""

from __future__ import annotations

from pathlib import Path

import torch

_MIN_TORCH = (2, 11)
_HOW_TO_BUILD = "run `make` in a clone, or `pip install --no-build-isolation .` in the environment that has torch"


def library_path() -> Path | None:
    """The compiled library beside this file (its suffix differs on free-threaded Python), None when it isn't built."""
    return next(iter(sorted(Path(__file__).parent.glob("_C.*so"))), None)


def load() -> None:
    """Registers torch.ops.torch_csb.*; doing it twice is harmless.

    Raises ImportError when torch is too old, the library isn't built, or it doesn't fit this torch.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _MIN_TORCH:
        raise ImportError(f"torch_csb needs torch 2.11 or newer, got {torch.__version__}")
    path = library_path()
    if path is None:
        raise ImportError(f"torch_csb's operators are not compiled: {_HOW_TO_BUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        message = f"{path.name} doesn't load into torch {torch.__version__} ({error}): {_HOW_TO_BUILD}"
        raise ImportError(message) from error


load()
