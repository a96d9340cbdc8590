"""Options that every command has."""

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
