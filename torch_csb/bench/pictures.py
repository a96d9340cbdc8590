"""Pictures, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure of that many inches, None (and a line that says so) where it isn't installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture was drawn: pip install matplotlib")
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    print(f"drawn: {picture}")
