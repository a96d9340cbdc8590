"""The layout of a CSB matrix: everything about it that is not an array.

A layout travels as a small int32 tensor ``[format_version, block_size, order, alignment]`` in
state_dicts and files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMAT_VERSION = 1
# An encoding has an order of its own, so that one number tells both.
ENCODINGS = {"codes": "row_major", "bitmap": "quarter_major"}
ORDERS = tuple(ENCODINGS.values())
BITMAP_BLOCK = 64
_WORDS = BITMAP_BLOCK  # of 64 bits, in a block


@dataclass(frozen=True)
class Layout:
    """Block size, order of the entries inside a block, and the alignment of every block's start.

    Args:
        block_size: edge of a block, a power of two from 2 to 256 (the kernels serve 16 to 256 best).
        order: how entries stand inside a block, which tells the encoding as well: ``"row_major"``, with codes, is by
            row, then by column; ``"quarter_major"``, with a bitmap, in blocks of 64, is by quarter (``col // 16``),
            then by row, then by column.
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
        if self.encoding == "bitmap" and self.block_size != BITMAP_BLOCK:
            raise ValueError(f"block_size: expected {BITMAP_BLOCK} with a bitmap, got {self.block_size}")
        alignment = 8 if self.block_size >= 16 else 1
        if self.alignment != alignment:
            raise ValueError(
                f"alignment: expected {alignment} for blocks of size {self.block_size}, got {self.alignment}"
            )

    @classmethod
    def of_block_size(cls, block_size: int, encoding: str = "codes") -> Layout:
        """The layout that packing uses: blocks too small for vector loads are not padded."""
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {encoding!r}")
        return cls(block_size, ENCODINGS[encoding], alignment=8 if block_size >= 16 else 1)

    @property
    def encoding(self) -> str:
        """``"codes"`` or ``"bitmap"``: what the tensor named codes holds."""
        return next(encoding for encoding, order in ENCODINGS.items() if order == self.order)

    @property
    def block_shift(self) -> int:
        return self.block_size.bit_length() - 1

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.int64 if self.encoding == "bitmap" else torch.uint8

    def codes_length(self, stored: int, blocks: int) -> int:
        """Elements of the tensor named codes for this many stored entries in so many blocks."""
        return blocks * _WORDS if self.encoding == "bitmap" else 2 * stored

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

    def rank(self, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
        """The place of each block-local (row, col) in a full block's entry order."""
        if self.order == "row_major":
            return (row << self.block_shift) | col
        return (col >> 4 << 10) | (row << 4) | (col & 15)


def bitmap_bit(row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """Which of a block's 4096 bits says whether there is an entry at (row, col) (csrc/csb/csb.h)."""
    word = (col >> 4 << 5) | (row >> 4 << 3) | (row & 7)
    return word << 5 | (col & 3) << 3 | (col >> 2 & 3) << 1 | (row >> 3 & 1)


def make_bitmap(block: torch.Tensor, row: torch.Tensor, col: torch.Tensor, blocks: int) -> torch.Tensor:
    """int64 ``[blocks * 64]``: the bitmap of distinct int64 block-local (row, col) in their blocks."""
    bit = bitmap_bit(row, col)
    words = torch.zeros(blocks * _WORDS, dtype=torch.int64, device=row.device)
    # Every bit is there once, so the sum is the or, in two's complement too.
    return words.index_add_(0, block * _WORDS + (bit >> 6), torch.ones_like(bit) << (bit & 63))


def full_bitmap(rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """int64 ``[64]``: a block with an entry everywhere in its first rows and columns."""
    row, col = torch.ones(rows, cols, dtype=torch.bool, device=device).nonzero(as_tuple=True)
    return make_bitmap(torch.zeros_like(row), row, col, 1)


def count_bits(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each element of an int64 tensor."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words * 0x0101010101010101 >> 56
