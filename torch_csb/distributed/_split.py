"""A matrix in parts, as ``torch.chunk`` would cut its rows or columns, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_csb import convert
from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix


def chunk_bounds(size: int, parts: int) -> list[tuple[int, int]]:
    """First and last-plus-one index of each part: torch.chunk's rule, with empty parts at the end, like DTensor's."""
    step = -(-size // parts)
    return [(min(part * step, size), min((part + 1) * step, size)) for part in range(parts)]


def split_matrix(w: CSBMatrix, parts: int, dim: int) -> list[CSBMatrix]:
    """Cuts W (m × k) into matrices of its own layout, as ``torch.chunk(W, parts, dim)`` would.

    The cuts fall where that rule puts them, inside a block too. Parts have equally many rows or columns, not equally
    many entries, since DTensor finds activations by this rule; shuffle the features beforehand where entries crowd.

    Args:
        w: not a transposed view.
        parts: how many; where W has too few rows or columns, the last ones are empty.
        dim: 0 for rows (output features), 1 for columns (input features).

    Raises:
        ValueError: a transposed view, ``parts`` below 1, ``dim`` neither 0 nor 1.
    """
    if parts < 1:
        raise ValueError(f"parts: expected at least 1, got {parts}")
    return [part_of(w, parts, dim, index, w.layout) for index in range(parts)]


def part_of(w: CSBMatrix, parts: int, dim: int, index: int, layout: Layout) -> CSBMatrix:
    """``split_matrix(w, parts, dim)[index]`` alone, in this layout."""
    _check(w, dim)
    low, high = chunk_bounds((w.m, w.k)[dim], parts)[index]
    coordinates = convert.coordinates(w)
    here = (coordinates[dim] >= low) & (coordinates[dim] < high)
    row, col = (position[here] for position in coordinates)
    values = w.values.detach()[w.is_entry][here]
    if dim == 0:
        return CSBMatrix(**convert.pack_entries(row - low, col, values, high - low, w.k, layout))
    return CSBMatrix(**convert.pack_entries(row, col - low, values, w.m, high - low, layout))


def join_matrices(parts: Sequence[CSBMatrix], dim: int) -> CSBMatrix:
    """The inverse of :func:`split_matrix`: ``torch.cat(parts, dim)``, in the layout of the first part.

    Raises:
        ValueError: no parts, a transposed view among them, ``dim`` neither 0 nor 1, or sizes that don't fit.
    """
    if not parts:
        raise ValueError("parts: expected at least one matrix, got none")
    rows, cols, start = [], [], 0
    for part in parts:
        _check(part, dim)
        across = (part.k, parts[0].k) if dim == 0 else (part.m, parts[0].m)
        if across[0] != across[1]:
            raise ValueError(f"parts: expected {across[1]} {'columns' if dim == 0 else 'rows'}, got {across[0]}")
        row, col = convert.coordinates(part)
        rows.append(row + start if dim == 0 else row)
        cols.append(col + start if dim == 1 else col)
        start += (part.m, part.k)[dim]
    values = torch.cat([part.values.detach()[part.is_entry] for part in parts])
    m, k = (start, parts[0].k) if dim == 0 else (parts[0].m, start)
    return CSBMatrix(**convert.pack_entries(torch.cat(rows), torch.cat(cols), values, m, k, parts[0].layout))


def _check(w: CSBMatrix, dim: int) -> None:
    if w.transposed:
        raise ValueError("w: expected an untransposed CSBMatrix, got a transposed view")
    if dim not in (0, 1):
        raise ValueError(f"dim: expected 0 (rows) or 1 (columns), got {dim}")
