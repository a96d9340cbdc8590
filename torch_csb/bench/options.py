"""Options that every command has, and what options are checked by."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="rows are appended below it")
    parser.add_argument("--plots", type=Path, default=Path("benchmarks/plots"), help="pictures are drawn below it")
    parser.add_argument(
        "--commit", help="what is measured, for a machine without its git history (default: asked of git)"
    )
    parser.add_argument("--seed", type=int, default=0)


def shape(text: str) -> tuple[int, int]:
    try:
        m, k = (int(size) for size in text.lower().split("x"))
        if m < 1 or k < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected rows x columns such as 4096x4096, got {text!r}") from None
    return m, k


def fraction(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction from 0 to below 1, such as 0.9, got {text!r}")
    return number


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}, which is none")
    return Path(text)
