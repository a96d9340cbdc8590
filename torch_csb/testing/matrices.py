"""Named test matrices. Each exists for a reason, and the reason is part of it."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class NamedMatrix:
    """A pattern to test with. ``dense()`` gives the weight; ``mask()`` the kept coordinates (they may hold zeros)."""

    name: str
    reason: str
    m: int
    k: int
    pattern: Callable[[torch.Generator], Tensor]  # bool [m, k]
    explicit_zeros: bool = False  # some kept entries hold the value 0: only a mask tells them

    def mask(self) -> Tensor:
        return self.pattern(_generator(self.name))

    def dense(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The weight. Its entries are normal, but never so small that a 16-bit cast would lose one."""
        generator = _generator(self.name)
        mask = self.pattern(generator)
        weight = torch.randn(self.m, self.k, generator=generator, dtype=torch.float64)
        weight = weight.sign() * weight.abs().clamp_min(2.0**-6) * mask
        if self.explicit_zeros:
            weight *= torch.rand(self.m, self.k, generator=generator) < 0.5
        return weight.to(device=device, dtype=dtype)

    def __str__(self) -> str:
        return self.name


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(byte * 31**i for i, byte in enumerate(name.encode())) % 2**31)


def uniform(m: int, k: int, sparsity: float, generator: torch.Generator | None = None) -> Tensor:
    """A bool pattern [m, k] whose elements are kept independently with probability ``1 - sparsity``."""
    return torch.rand(m, k, generator=generator) >= sparsity


def _nowhere(m: int, k: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.zeros(m, k, dtype=torch.bool)


def _uniform(m: int, k: int, sparsity: float) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: uniform(m, k, sparsity, generator)


def _uniform_where(m: int, k: int, sparsity: float, rows: slice, columns: slice) -> Callable[[torch.Generator], Tensor]:
    def pattern(generator: torch.Generator) -> Tensor:
        mask = torch.zeros(m, k, dtype=torch.bool)
        mask[rows, columns] = uniform(m, k, sparsity, generator)[rows, columns]
        return mask

    return pattern


def _power_law_rows(generator: torch.Generator) -> Tensor:
    m, k = 320, 384
    length = (k * (torch.arange(m) + 1.0) ** -0.8)[torch.randperm(m, generator=generator)]
    return torch.rand(m, k, generator=generator) < length[:, None] / k


def _full(m: int, k: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.ones(m, k, dtype=torch.bool)


def _tile_edge(m: int, k: int) -> NamedMatrix:
    return NamedMatrix(f"edge_{m}x{k}", "sizes at a tile, one less and one more", m, k, _uniform(m, k, 0.7))


_EVERYTHING = slice(None)

MATRICES: tuple[NamedMatrix, ...] = (
    NamedMatrix("0x0", "no row, no column, no block", 0, 0, _nowhere(0, 0)),
    NamedMatrix("0x70", "no output features: nothing may be written", 0, 70, _nowhere(0, 70)),
    NamedMatrix("70x0", "no input features: the output is act(bias)", 70, 0, _nowhere(70, 0)),
    NamedMatrix("1x1", "the smallest matrix", 1, 1, _full(1, 1)),
    NamedMatrix("one_row", "a block with one row: a dot product", 1, 300, _uniform(1, 300, 0.5)),
    NamedMatrix("one_column", "a block with one column: an outer product", 300, 1, _uniform(300, 1, 0.5)),
    NamedMatrix(
        "empty_block_row",
        "strips without any entry must still be written",
        513,
        200,
        _uniform_where(513, 200, 0.6, slice(0, 256), _EVERYTHING),
    ),
    NamedMatrix(
        "empty_block_column",
        "the same for the transposed direction",
        200,
        513,
        _uniform_where(200, 513, 0.6, _EVERYTHING, slice(256, 513)),
    ),
    NamedMatrix("empty", "blocks, but no entry in any", 130, 150, _nowhere(130, 150)),
    NamedMatrix("full", "blocks with block_size² entries, 65 536 of them in the largest", 257, 256, _full(257, 256)),
    NamedMatrix(
        "one_dense_row",
        "one row owns every entry: the worst case for a row split",
        300,
        1024,
        _uniform_where(300, 1024, 0.0, slice(77, 78), _EVERYTHING),
    ),
    NamedMatrix(
        "one_dense_column",
        "one column owns every entry: the worst case for the transposed direction",
        1024,
        300,
        _uniform_where(1024, 300, 0.0, _EVERYTHING, slice(77, 78)),
    ),
    NamedMatrix(
        "half_empty",
        "the left half is dense, the right half empty",
        256,
        512,
        _uniform_where(256, 512, 0.3, _EVERYTHING, slice(0, 256)),
    ),
    NamedMatrix("power_law_rows", "rows of very different lengths, as pruning makes them", 320, 384, _power_law_rows),
    _tile_edge(15, 17),
    _tile_edge(63, 65),
    _tile_edge(64, 64),
    _tile_edge(65, 63),
    _tile_edge(255, 257),
    _tile_edge(257, 255),
    NamedMatrix("uniform_50", "the densest case that is still meant to be sparse", 192, 320, _uniform(192, 320, 0.50)),
    NamedMatrix("uniform_90", "the everyday case", 320, 448, _uniform(320, 448, 0.90)),
    NamedMatrix("uniform_99", "blocks with few entries or none", 512, 640, _uniform(512, 640, 0.99)),
    NamedMatrix("tall", "many block rows, one block column", 1500, 40, _uniform(1500, 40, 0.8)),
    NamedMatrix("wide", "one block row, many block columns", 40, 1500, _uniform(40, 1500, 0.8)),
    NamedMatrix(
        "identity", "one entry a row and a column: W X must be X, to the bit", 200, 200, lambda g: torch.eye(200) > 0
    ),
    NamedMatrix(
        "explicit_zeros",
        "a mask keeps entries whose value is zero: they train, so they are stored",
        150,
        170,
        _uniform(150, 170, 0.7),
        explicit_zeros=True,
    ),
)

_BY_NAME = {case.name: case for case in MATRICES}


def matrix(name: str) -> NamedMatrix:
    return _BY_NAME[name]


def read_smtx(path: str | os.PathLike[str]) -> Tensor:
    """The pattern of a DLMC file (``.smtx`` or ``.smtx.gz``) as a bool tensor [m, k].

    The format (Gale, Zaharia, Young, Elsen, SC 2020): a line ``rows, columns, nonzeros``, a line of row offsets, a line
    of column indices. Raises ``ValueError`` naming the file when the three do not fit together.
    """
    path = Path(path)
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        size = [int(number) for number in file.readline().split(",")]
        row_ptr = np.array(file.readline().split(), dtype=np.int64)
        col = np.array(file.readline().split(), dtype=np.int64)
    if len(size) != 3:
        raise ValueError(f"{path}: expected a first line 'rows, columns, nonzeros', got {len(size)} numbers")
    m, k, nnz = size
    length = np.diff(row_ptr)
    if len(row_ptr) != m + 1 or row_ptr[0] != 0 or row_ptr[-1] != nnz or (length < 0).any():
        raise ValueError(f"{path}: expected {m + 1} ascending row offsets from 0 to {nnz}")
    if len(col) != nnz or (nnz and not (col.min() >= 0 and col.max() < k)):
        raise ValueError(f"{path}: expected {nnz} column indices below {k}")
    mask = torch.zeros(m, k, dtype=torch.bool)
    mask[torch.from_numpy(np.repeat(np.arange(m), length)), torch.from_numpy(col)] = True
    return mask
