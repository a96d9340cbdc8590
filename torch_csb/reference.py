"""One naive implementation of the format and its operators in plain torch.

Tests, examples and benchmarks check the kernels against it. It works in any floating dtype (use float64 for a
reference), on any device, knows no kernel, and spends a dense copy of W. In mathematics, with X of k features and Y of
m features by n columns::

    spmm    Y = act(W X + b)            spmm_t  X = act(W^T Y + b)            sddmm  v[e] = (A B^T)[row(e), col(e)]

Every function takes a matrix with the attributes of ``torch_csb.CSBMatrix`` (``values, codes, blk_ptr, blk_pad, m, k,
block_size``) and works on its stored orientation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch_csb.matrix import CSBMatrix

ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
}


class Entries(NamedTuple):
    """Where each entry stands: ``W[row[i], col[i]] = values[index[i]]``, padding entries left out (all int64)."""

    row: Tensor
    col: Tensor
    index: Tensor


def swizzle(row: Tensor, block_size: int) -> Tensor:
    """The column bits that a block-local row flips: ``(row & mask) << 3``, nothing in blocks narrower than 16."""
    mask = min(block_size // 8, 8) - 1 if block_size >= 16 else 0
    return (row & mask) << 3


def encode(row: Tensor, col: Tensor, block_size: int) -> Tensor:
    """The uint8 code buffer of block-local coordinates: ``row * block_size + (col ^ swizzle(row))``, little-endian."""
    code = row.long() * block_size + (col.long() ^ swizzle(row.long(), block_size))
    return torch.stack((code & 255, code >> 8), dim=-1).to(torch.uint8).reshape(-1)


def bitmap_place() -> Tensor:
    """``row * 64 + col`` of each of the 4096 bits of a block, from the lowest one of the first word on."""
    bit = torch.arange(64 * 64)
    word, bit = bit // 32, bit % 32
    row = 16 * (word // 8 % 4) + word % 8 + 8 * (bit % 2)
    col = 16 * (word // 32) + 4 * (bit // 2 % 4) + bit // 8
    return row * 64 + col


def decode_bitmap(w: CSBMatrix) -> Entries:
    """Global coordinates of every entry of a bitmap, by quarter, row and column inside a block."""
    bits = w.codes.view(-1, 64, 1) >> torch.arange(64, device=w.codes.device) & 1
    dense = torch.zeros(bits.shape[0], 64 * 64, dtype=torch.bool, device=bits.device)
    dense[:, bitmap_place().to(bits.device)] = bits.flatten(1).bool()
    quarters = dense.view(-1, 64, 4, 16).transpose(1, 2)
    block, quarter, row, col = quarters.nonzero(as_tuple=True)
    first = quarters.flatten(1).sum(1).cumsum(0).roll(1)
    first[:1] = 0
    index = w.blk_ptr.long()[block] + torch.arange(block.numel(), device=block.device) - first[block]
    block_columns = max(-(-w.k // 64), 1)
    return Entries(row + block // block_columns * 64, 16 * quarter + col + block % block_columns * 64, index)


def decode(w: CSBMatrix) -> Entries:
    """Global coordinates of every entry, in entry order."""
    if w.codes.dtype == torch.int64:
        return decode_bitmap(w)
    pair = w.codes.view(-1, 2).long()
    code = pair[:, 0] + 256 * pair[:, 1]
    row = code // w.block_size
    col = (code % w.block_size) ^ swizzle(row, w.block_size)
    ptr = w.blk_ptr.long()
    length = ptr.diff()
    block = torch.repeat_interleave(torch.arange(length.numel(), device=ptr.device), length)
    index = torch.arange(code.numel(), device=ptr.device)
    real = index < (ptr[1:] - w.blk_pad.long())[block]
    block_columns = max(-(-w.k // w.block_size), 1)
    row = row + block // block_columns * w.block_size
    col = col + block % block_columns * w.block_size
    return Entries(row[real], col[real], index[real])


def to_dense(w: CSBMatrix, dtype: torch.dtype | None = None) -> Tensor:
    """W as a dense m x k tensor. Coordinates that occur twice are added up."""
    at = decode(w)
    dense = torch.zeros(w.m, w.k, dtype=dtype or w.values.dtype, device=w.values.device)
    return dense.index_put_((at.row, at.col), w.values.detach()[at.index].to(dense.dtype), accumulate=True)


def apply(
    matrix: Tensor, x: Tensor, bias: Tensor | None = None, activation: str | None = None, dim: int = -1
) -> Tensor:
    """``act(matrix @ x + bias)`` over the feature dimension ``dim``; the other dimensions enumerate columns."""
    y = x.movedim(dim, -1) @ matrix.mT
    if bias is not None:
        y = y + bias
    return ACTIVATIONS[activation](y).movedim(-1, dim).contiguous()


def spmm(
    w: CSBMatrix, x: Tensor, bias: Tensor | None = None, *, activation: str | None = None, dim: int = -1
) -> Tensor:
    """``act(W X + b)``, in the dtype of ``x``: ``F.linear(x, W, b)`` for ``dim=-1``."""
    return apply(to_dense(w, x.dtype), x, bias, activation, dim)


def spmm_t(
    w: CSBMatrix, x: Tensor, bias: Tensor | None = None, *, activation: str | None = None, dim: int = -1
) -> Tensor:
    """``act(W^T X + b)``, in the dtype of ``x``."""
    return apply(to_dense(w, x.dtype).mT, x, bias, activation, dim)


def outer(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """``A B^T`` over all columns: [m, k]."""
    a = a.movedim(dim, -1)
    b = b.movedim(dim, -1)
    columns = a.shape[:-1].numel()
    return a.reshape(columns, a.shape[-1]).mT @ b.reshape(columns, b.shape[-1])


def sddmm(w: CSBMatrix, a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    """``(A B^T)`` at the entries of W, zero at its padding: one number for each element of ``values``."""
    at = decode(w)
    sampled = torch.zeros(w.values.numel(), dtype=a.dtype, device=a.device)
    sampled[at.index] = outer(a, b, dim)[at.row, at.col]
    return sampled
