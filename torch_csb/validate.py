"""Validation of CSB arrays, invariant by invariant (docs/format.md, csrc/csb/csb.h)."""

from __future__ import annotations

import torch

from torch_csb.layout import BITMAP_BLOCK, Layout, count_bits, full_bitmap

VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INT32_MAX = 2**31 - 1


def _require(condition: bool, invariant: int, message: str) -> None:
    if not condition:
        raise ValueError(f"invariant {invariant}: {message}")


def _vector(
    tensor: torch.Tensor, name: str, invariant: int, dtypes: tuple[torch.dtype, ...], length: int, by: str = ""
) -> None:
    _require(tensor.dtype in dtypes, invariant, f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    _require(
        tensor.shape == (length,) and tensor.is_contiguous(),
        invariant,
        f"{name}: expected {length} contiguous elements{by}, got shape {tuple(tensor.shape)}",
    )


def validate_arrays(
    values: torch.Tensor,
    codes: torch.Tensor,
    blk_ptr: torch.Tensor,
    blk_pad: torch.Tensor,
    *,
    m: int,
    k: int,
    layout: Layout,
    strict: bool = False,
) -> None:
    """Checks arrays of unknown origin before a kernel trusts them.

    ``strict`` also asks that padding entries carry the value 0; kernels never read them, so a
    training run that disturbed them stays loadable.

    Raises:
        ValueError: ``"invariant N: array: expected ..., got ..."`` for the first violation.
    """
    block_size = layout.block_size
    mb, kb = -(-m // block_size), -(-k // block_size)
    blocks = mb * kb
    devices = {str(array.device) for array in (values, codes, blk_ptr, blk_pad)}
    _require(len(devices) == 1, 2, f"expected all arrays on one device, got {', '.join(sorted(devices))}")
    _require(blocks < INT32_MAX, 1, f"expected fewer than 2^31 - 1 blocks, got {blocks}")

    # The prefix and the padding counts (2, 5).
    _vector(blk_ptr, "blk_ptr", 2, (torch.int32,), blocks + 1)
    _vector(blk_pad, "blk_pad", 5, (torch.uint8,), blocks)
    ends = blk_ptr[[0, -1]].tolist()
    _require(ends[0] == 0, 2, f"blk_ptr: expected to start at 0, got {ends[0]}")
    sizes = blk_ptr.to(torch.int64).diff()
    if blocks:
        worst = int(sizes.argmin())
        _require(int(sizes[worst]) >= 0, 2, f"blk_ptr: expected a monotone prefix, it falls after block {worst}")
    stored = ends[1]
    _require(stored >= 0, 2, f"blk_ptr: expected a non-negative end, got {stored}")
    # The two may contradict each other, and nothing here can tell which of them is wrong.
    _vector(values, "values", 6, VALUE_DTYPES, stored, " as blk_ptr ends")
    bitmap = layout.encoding == "bitmap"
    by = " for the blocks" if bitmap else " as blk_ptr ends"
    _vector(codes, "codes", 3, (layout.codes_dtype,), layout.codes_length(stored, blocks), by)
    alignment = 8 if bitmap else 2
    _require(codes.data_ptr() % alignment == 0, 3, f"codes: expected data aligned to {alignment} bytes")
    if not blocks:
        return
    misaligned = blk_ptr % layout.alignment != 0
    _require(not bool(misaligned.any()), 2, f"blk_ptr: expected multiples of the alignment {layout.alignment}")
    pad = blk_pad.to(torch.int64)
    bad = (pad > sizes) | (pad >= layout.alignment)
    _require(
        not bool(bad.any()),
        5,
        f"blk_pad: block {int(bad.long().argmax())} has more padding than its size or alignment allow",
    )
    counts = sizes - pad
    _require(
        int(counts.max()) <= block_size**2,
        4,
        f"blk_ptr: block {int(counts.argmax())} holds {int(counts.max())} entries, has {block_size**2} elements",
    )

    if bitmap:
        _check_bitmap(codes, counts, m, k)
    if stored == 0 or (bitmap and not strict):
        return
    block = torch.repeat_interleave(torch.arange(blocks, device=blk_ptr.device, dtype=torch.int32), sizes)
    offset = torch.arange(stored, device=blk_ptr.device, dtype=torch.int32) - blk_ptr[:-1][block]
    entry = offset < counts.to(torch.int32)[block]
    if not bitmap:
        _check_codes(codes, block, entry, m, k, layout)
    if strict:
        _require(not bool((values[~entry] != 0).any()), 5, "values: expected padding entries to be 0")


def _check_bitmap(codes: torch.Tensor, counts: torch.Tensor, m: int, k: int) -> None:
    """Invariants 3 and 4 of a bitmap: as many bits as entries, none outside the matrix."""
    mb, kb = -(-m // BITMAP_BLOCK), -(-k // BITMAP_BLOCK)
    words = codes.view(mb, kb, -1)
    rows, cols = m - (mb - 1) * BITMAP_BLOCK, k - (kb - 1) * BITMAP_BLOCK
    beyond = torch.zeros(mb, kb, dtype=torch.bool, device=codes.device)
    beyond[-1] |= (words[-1] & ~full_bitmap(rows, BITMAP_BLOCK, codes.device)).any(-1)
    beyond[:, -1] |= (words[:, -1] & ~full_bitmap(BITMAP_BLOCK, cols, codes.device)).any(-1)
    if bool(beyond.any()):
        b = int(beyond.flatten().int().argmax())
        _require(False, 4, f"codes: the bitmap of block {b} has bits outside the {m} x {k} matrix")
    bits = count_bits(words).sum(-1).flatten()
    if bool((bits != counts).any()):
        b = int((bits != counts).int().argmax())
        _require(False, 3, f"codes: expected {int(counts[b])} bits in block {b} as blk_ptr says, got {int(bits[b])}")


def _check_codes(codes: torch.Tensor, block: torch.Tensor, entry: torch.Tensor, m: int, k: int, layout: Layout) -> None:
    """Invariants 3, 4 and 5 of codes. Each belongs to its ``block``, and to an entry where ``entry`` says so."""
    block_size = layout.block_size
    kb = -(-k // block_size)
    row, col = layout.decode(codes)
    _require(int(row.max()) < block_size, 3, f"codes: expected rows below {block_size}, got {int(row.max())}")
    outside = entry & (((block // kb) * block_size + row >= m) | ((block % kb) * block_size + col >= k))
    if bool(outside.any()):
        e = int(outside.int().argmax())
        r, c = int(block[e]) // kb * block_size + int(row[e]), int(block[e]) % kb * block_size + int(col[e])
        _require(False, 4, f"codes: entry {e} is at ({r}, {c}), outside the {m} x {k} matrix")
    place = row * block_size + col
    follows = entry[1:] & (block[1:] == block[:-1])
    not_after = follows & (place[1:] <= place[:-1])
    if bool(not_after.any()):
        _report_disorder(int(not_after.int().argmax()) + 1, place, block, entry, block_size, kb, layout)
    _require(
        not bool((row | col)[~entry].any()),
        5,
        "codes: expected the padding entries that blk_pad counts to have code 0",
    )


def _report_disorder(
    e: int, place: torch.Tensor, block: torch.Tensor, entry: torch.Tensor, block_size: int, kb: int, layout: Layout
) -> None:
    """Tells a coordinate that occurs twice (4) from entries out of order (5)."""
    b = int(block[e])
    inside = place[(block == b) & entry]
    found, times = inside.unique(return_counts=True)
    twice = found[times > 1]
    if twice.numel():
        p = int(twice[0])
        r, c = b // kb * block_size + p // block_size, b % kb * block_size + p % block_size
        _require(False, 4, f"codes: coordinate ({r}, {c}) occurs {int(times.max())} times in block {b}")
    _require(False, 5, f"codes: entry {e} of block {b} is out of {layout.order} order")
