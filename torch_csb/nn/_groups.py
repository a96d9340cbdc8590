"""Grouped 1x1 convolutions: W is block diagonal, and its structural zeros between the groups cost no entry."""

from __future__ import annotations

from torch import Tensor

from torch_csb import convert
from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix


def pack(weight: Tensor, mask: Tensor | None, groups: int, layout: Layout | convert.LayoutRule) -> CSBMatrix:
    """``[m, k / groups]``, the weights of each output channel in its own group, as the block diagonal m × k."""
    m, width = weight.shape
    row, col = (weight != 0 if mask is None else mask).nonzero(as_tuple=True)
    values = weight.detach()[row, col]
    return CSBMatrix(
        **convert.pack_entries(row, col + first_column(row, m, width, groups), values, m, width * groups, layout)
    )


def first_column(row: Tensor, m: int, width: int, groups: int) -> Tensor:
    """The first input channel of each row's group."""
    return row.div(max(m // groups, 1), rounding_mode="floor") * width


def local_index(matrix: CSBMatrix, groups: int) -> tuple[Tensor, Tensor]:
    """int64 (row, column in its group) of every entry, in entry order.

    Raises:
        ValueError: an entry joins two groups.
    """
    width = matrix.k // groups
    row, col = convert.coordinates(matrix)
    local = col - first_column(row, matrix.m, width, groups)
    if bool(((local < 0) | (local >= width)).any()):
        e = int(((local < 0) | (local >= width)).int().argmax())
        raise ValueError(
            f"codes: entry {e} is at ({int(row[e])}, {int(col[e])}), outside the {groups} groups of "
            f"{matrix.m // groups} x {width} on the diagonal"
        )
    return row, local


def unpack(matrix: CSBMatrix, groups: int) -> Tensor:
    """``[m, k / groups]``, the inverse of :func:`pack`."""
    row, col = local_index(matrix, groups)
    dense = matrix.values.new_zeros(matrix.m, matrix.k // groups)
    dense[row, col] = matrix.values.detach()[matrix.is_entry]
    return dense
