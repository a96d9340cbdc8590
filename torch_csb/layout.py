"""The layout of a CSB matrix: everything about it that is not an array.

A layout travels as a small int32 tensor ``[format_version, block_size, order, alignment]`` in
state_dicts and files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMAT_VERSION = 1
ORDERS = ("row_major",)


@dataclass(frozen=True)
class Layout:
    """Block size, order of the entries inside a block, and the alignment of every block's start.

    Args:
        block_size: edge of a block, a power of two from 2 to 256 (the kernels serve 16 to 256 best).
        order: how entries stand inside a block; ``"row_major"`` is by row, then by column.
        alignment: every block starts at a multiple of this many entries: 8, so that kernels load
            vectors, or 1 for blocks below 16, which have no vectors to load.

    Raises:
        ValueError: if a field has no meaning in this version of the format.
    """

    block_size: int
    order: str = "row_major"
    alignment: int = 8

    def __post_init__(self) -> None:
        if not (2 <= self.block_size <= 256 and self.block_size & (self.block_size - 1) == 0):
            raise ValueError(f"block_size: expected a power of two from 2 to 256, got {self.block_size}")
        if self.order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        alignment = 8 if self.block_size >= 16 else 1
        if self.alignment != alignment:
            raise ValueError(
                f"alignment: expected {alignment} for blocks of size {self.block_size}, got {self.alignment}"
            )

    @classmethod
    def of_block_size(cls, block_size: int) -> Layout:
        """The layout that packing uses: blocks too small for vector loads are not padded."""
        return cls(block_size, alignment=8 if block_size >= 16 else 1)

    @property
    def block_shift(self) -> int:
        return self.block_size.bit_length() - 1

    def to_tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        fields = [FORMAT_VERSION, self.block_size, ORDERS.index(self.order), self.alignment]
        return torch.tensor(fields, dtype=torch.int32, device=device)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> Layout:
        """Reads an untrusted layout tensor.

        Raises:
            ValueError: wrong dtype or length, or fields of a newer format.
        """
        if tensor.dtype != torch.int32 or tensor.shape != (4,):
            raise ValueError(f"layout: expected 4 int32 elements, got {tuple(tensor.shape)} of {tensor.dtype}")
        version, block_size, order, alignment = tensor.tolist()
        if version != FORMAT_VERSION:
            raise ValueError(
                f"layout: expected format version {FORMAT_VERSION}, got {version}"
                + ("; a newer torch_csb wrote this, please upgrade" if version > FORMAT_VERSION else "")
            )
        if not 0 <= order < len(ORDERS):
            raise ValueError(f"layout: expected an entry order below {len(ORDERS)}, got {order}")
        return cls(block_size, ORDERS[order], alignment)

    def swizzle(self, row: torch.Tensor) -> torch.Tensor:
        """Which bits of the column the row flips in a code (csrc/csb/csb.h)."""
        groups = min(self.block_size // 8, 8) if self.block_size >= 16 else 1
        return (row & (groups - 1)) << 3

    def encode(self, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        """Block-local (row, col) to 16-bit codes, as a uint8 tensor of two bytes an entry."""
        code = (row << self.block_shift) | (col ^ self.swizzle(row))
        return code.to(torch.int32).to(torch.uint16).view(torch.uint8)

    def decode(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of :meth:`encode`: int32 (row, col)."""
        code = codes.view(torch.uint16).to(torch.int32)
        row = code >> self.block_shift
        return row, (code & (self.block_size - 1)) ^ self.swizzle(row)
