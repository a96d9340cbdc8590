"""To and from dense, COO, CSR and SciPy matrices: what stands behind CSBMatrix.from_* and to_*."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torch_csb import _load  # noqa: F401  (registers the operators)
from torch_csb.layout import BITMAP_BLOCK, ENCODINGS, Layout, make_bitmap
from torch_csb.validate import INT32_MAX, VALUE_DTYPES

if TYPE_CHECKING:
    import scipy.sparse

    from torch_csb.matrix import CSBMatrix


TARGETS = ("auto", "cpu", "cuda")
MIN_BITMAP_DENSITY = 0.28


def choose_encoding(cuda: bool, block_size: int, dtype: torch.dtype, nnz: int, elements: int) -> str:
    """``"bitmap"`` where the GPU's kernels for 16 bits take one and it saves enough traffic, else ``"codes"``.

    A bitmap costs a bit for each element, zeros too, and codes cost 16 for each entry, so that a bitmap is the smaller
    one above a density of 1/16. Expanding it costs the zeros something as well, hence the larger MIN_BITMAP_DENSITY.
    """
    dense_enough = elements > 0 and nnz >= MIN_BITMAP_DENSITY * elements
    suits = cuda and block_size == BITMAP_BLOCK and dtype.itemsize == 2
    return "bitmap" if suits and dense_enough else "codes"


@dataclass(frozen=True)
class LayoutRule:
    """What decides the layout of a matrix whose entries are still to be counted."""

    block_size: int
    cuda: bool
    encoding: str | None

    def layout(self, dtype: torch.dtype, nnz: int, elements: int) -> Layout:
        encoding = self.encoding or choose_encoding(self.cuda, self.block_size, dtype, nnz, elements)
        return Layout.of_block_size(self.block_size, encoding)


def choose_layout(block_size: int | None, target: str, encoding: str | None = None) -> LayoutRule:
    """The layout for a matrix that will run on ``target`` ("auto": CUDA where torch has it).

    GPUs expand a 64 x 64 block into shared memory; CPUs want long runs of a row within one block.
    """
    cuda = is_cuda(target)
    if encoding is not None and encoding not in ENCODINGS:
        raise ValueError(f"encoding: expected None or one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if block_size is None:
        block_size = 64 if cuda or encoding == "bitmap" else 256
    Layout.of_block_size(block_size, encoding or "codes")  # refuses what no layout has
    return LayoutRule(block_size, cuda, encoding)


def _settled(layout: Layout | LayoutRule, dtype: torch.dtype, nnz: int, elements: int) -> Layout:
    return layout.layout(dtype, nnz, elements) if isinstance(layout, LayoutRule) else layout


def is_cuda(target: str) -> bool:
    """Whether what is packed for this target will run on CUDA."""
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    return target == "cuda" or (target == "auto" and torch.cuda.is_available())


def plan(blk_ptr: torch.Tensor, blk_pad: torch.Tensor, m: int, k: int, block_size: int) -> torch.Tensor:
    """The pattern's work units, int32 ``[2, num_units + 1]`` on the device of ``blk_ptr``."""
    mb, kb = -(-m // block_size), -(-k // block_size)
    return torch.ops.torch_csb.plan(blk_ptr.cpu(), blk_pad.cpu(), mb, kb).to(blk_ptr.device)


def is_entry(blk_ptr: torch.Tensor, blk_pad: torch.Tensor) -> torch.Tensor:
    """bool ``[stored]``: True at entries, False at padding."""
    stored = int(blk_ptr[-1])
    mark = torch.ones(stored, dtype=torch.bool, device=blk_ptr.device)
    ends = blk_ptr[1:].long()
    for i in range(1, int(blk_pad.max()) + 1 if blk_pad.numel() else 1):
        mark[ends[blk_pad >= i] - i] = False
    return mark


def entry_codes(w: CSBMatrix) -> torch.Tensor:
    """uint8 ``[2 * stored]``: the codes of W's entries in their order, whatever the encoding."""
    if w.layout.encoding == "codes":
        return w.codes
    return torch.ops.torch_csb.to_codes(w.codes, w.blk_ptr, w.blk_pad, w.m, w.k, w.values.numel())


def _prefix(counts: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """(blk_ptr, blk_pad) of blocks with these many entries, on the host."""
    counts = counts.to(torch.int64)
    padded = (counts + layout.alignment - 1) // layout.alignment * layout.alignment
    ends = padded.cumsum(0)
    stored = int(ends[-1]) if ends.numel() else 0
    if stored > INT32_MAX:
        raise ValueError(f"expected at most 2^31 - 1 stored entries, got {stored}; split the matrix")
    blk_ptr = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return blk_ptr, (padded - counts).to(torch.uint8)


def count_kept(w: torch.Tensor, mask: torch.Tensor | None) -> int:
    """Elements that packing would store; unlike torch.count_nonzero, without temporaries of the size of w."""
    return int(torch.ops.torch_csb.count(w, mask, 64).sum(dtype=torch.int64))


def pack_dense(w: torch.Tensor, mask: torch.Tensor | None, layout: Layout | LayoutRule) -> dict[str, Any]:
    if w.dtype not in VALUE_DTYPES:
        raise ValueError(f"w: expected dtype float64, float32, bfloat16 or float16, got {w.dtype}")
    if w.dim() != 2:
        raise ValueError(f"w: expected a matrix, got shape {tuple(w.shape)}")
    if mask is not None:
        if mask.shape != w.shape:
            raise ValueError(f"mask: expected shape {tuple(w.shape)}, got {tuple(mask.shape)}")
        mask = mask if mask.dtype == torch.bool else mask != 0
    w = w.detach()
    m, k = w.shape
    block_size = layout.block_size
    counts = torch.ops.torch_csb.count(w, mask, block_size).cpu()
    layout = _settled(layout, w.dtype, int(counts.sum(dtype=torch.int64)), m * k)
    blk_ptr, blk_pad = _prefix(counts, layout)
    units = torch.ops.torch_csb.plan(blk_ptr, blk_pad, -(-m // block_size), -(-k // block_size)).to(w.device)
    stored = int(blk_ptr[-1])
    blk_ptr, blk_pad = blk_ptr.to(w.device), blk_pad.to(w.device)
    if layout.encoding == "bitmap":
        values, codes = torch.ops.torch_csb.pack_bitmap(w, mask, blk_ptr, blk_pad, stored)
    else:
        values, codes = torch.ops.torch_csb.pack(w, mask, blk_ptr, blk_pad, block_size, stored)
    return {
        "values": values,
        "codes": codes,
        "blk_ptr": blk_ptr,
        "blk_pad": blk_pad,
        "units": units,
        "m": m,
        "k": k,
        "layout": layout,
    }


def pack_entries(
    row: torch.Tensor, col: torch.Tensor, values: torch.Tensor, m: int, k: int, layout: Layout | LayoutRule
) -> dict[str, Any]:
    """Packs entries in any order; no coordinate may occur twice.

    Args:
        row, col: int64 ``[nnz]`` coordinates.
        values: ``[nnz]``.
    """
    if values.dtype not in VALUE_DTYPES:
        raise ValueError(f"values: expected dtype float64, float32, bfloat16 or float16, got {values.dtype}")
    values = values.detach()
    layout = _settled(layout, values.dtype, len(row), m * k)
    shift, block_size = layout.block_shift, layout.block_size
    mb, kb = -(-m // block_size), -(-k // block_size)
    for name, index, size in (("row", row, m), ("col", col, k)):
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= size):
            raise ValueError(
                f"{name}: expected indices from 0 to {size - 1}, got {int(index.min())} to {int(index.max())}"
            )
    block = (row >> shift) * kb + (col >> shift)
    local_row, local_col = row & (block_size - 1), col & (block_size - 1)
    key, order = ((block << 2 * shift) | layout.rank(local_row, local_col)).sort()
    twice = key[1:] == key[:-1]
    if bool(twice.any()):
        e = int(order[int(twice.int().argmax())])
        raise ValueError(f"expected distinct coordinates, got ({int(row[e])}, {int(col[e])}) twice")

    counts = torch.bincount(block, minlength=mb * kb)
    host_ptr, host_pad = _prefix(counts.cpu(), layout)
    blk_ptr, blk_pad = host_ptr.to(values.device), host_pad.to(values.device)
    units = torch.ops.torch_csb.plan(host_ptr, host_pad, mb, kb).to(values.device)
    starts = counts.cumsum(0) - counts
    block, local_row, local_col = block[order], local_row[order], local_col[order]
    place = torch.arange(len(order), device=values.device) + (blk_ptr[:-1] - starts)[block]
    stored = int(host_ptr[-1])
    packed = values.new_zeros(stored)
    packed[place] = values[order]
    if layout.encoding == "bitmap":
        codes = make_bitmap(block, local_row, local_col, mb * kb)
    else:
        pairs = torch.zeros(stored, 2, dtype=torch.uint8, device=values.device)
        pairs[place] = layout.encode(local_row, local_col).view(-1, 2)
        codes = pairs.view(-1)
    return {
        "values": packed,
        "codes": codes,
        "blk_ptr": blk_ptr,
        "blk_pad": blk_pad,
        "units": units,
        "m": m,
        "k": k,
        "layout": layout,
    }


def pack_coo(w: torch.Tensor, layout: Layout | LayoutRule) -> dict[str, Any]:
    if w.layout != torch.sparse_coo or w.dim() != 2:
        raise ValueError(f"w: expected a torch.sparse_coo matrix, got {w.layout} of shape {tuple(w.shape)}")
    w = w.detach().coalesce()
    row, col = w.indices()
    return pack_entries(row, col, w.values(), *w.shape, layout)


def pack_csr(w: torch.Tensor, layout: Layout | LayoutRule) -> dict[str, Any]:
    if w.layout != torch.sparse_csr or w.dim() != 2:
        raise ValueError(f"w: expected a torch.sparse_csr matrix, got {w.layout} of shape {tuple(w.shape)}")
    w = w.detach()
    lengths = w.crow_indices().to(torch.int64).diff()
    row = torch.repeat_interleave(torch.arange(w.shape[0], device=w.device), lengths)
    return pack_entries(row, w.col_indices().to(torch.int64), w.values(), *w.shape, layout)


def pack_scipy(w: scipy.sparse.spmatrix | scipy.sparse.sparray, layout: Layout | LayoutRule) -> dict[str, Any]:
    coo = w.tocoo(copy=True)
    if len(coo.shape) != 2:
        raise ValueError(f"w: expected a matrix, got shape {coo.shape}")
    coo.sum_duplicates()
    row, col, values = (torch.from_numpy(array) for array in (coo.row, coo.col, coo.data))
    return pack_entries(row.to(torch.int64), col.to(torch.int64), values, *coo.shape, layout)


def unpack_dense(w: CSBMatrix) -> torch.Tensor:
    return torch.ops.torch_csb.unpack(w.values.detach(), w.codes, w.blk_ptr, w.blk_pad, w.m, w.k, w.block_size)


def local_coordinates(w: CSBMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 (row, col) of every entry inside its block, padding left out, in entry order."""
    row, col = w.layout.decode(entry_codes(w))
    entry = w.is_entry
    return row[entry], col[entry]


def coordinates(w: CSBMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 (row, col) of every entry of the untransposed matrix, padding left out, in entry order."""
    kb = -(-w.k // w.block_size)
    counts = w.blk_ptr.diff().to(torch.int64) - w.blk_pad
    block = torch.repeat_interleave(torch.arange(len(counts), device=w.device), counts)
    row, col = local_coordinates(w)
    return (
        torch.div(block, max(kb, 1), rounding_mode="floor") * w.block_size + row,
        block % max(kb, 1) * w.block_size + col,
    )


def unpack_coo(w: CSBMatrix) -> torch.Tensor:
    row, col = coordinates(w)
    index = torch.stack((col, row) if w.transposed else (row, col))
    values = w.values.detach()[w.is_entry]
    return torch.sparse_coo_tensor(index, values, tuple(w.shape), check_invariants=False).coalesce()


def unpack_scipy(w: CSBMatrix) -> scipy.sparse.csr_array:
    import scipy.sparse

    coo = unpack_coo(w).cpu()
    values = coo.values()
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    return scipy.sparse.coo_array((values.numpy(), coo.indices().numpy()), shape=tuple(w.shape)).tocsr()
