"""Shared-memory wavefronts of the CUDA kernels, counted from the pattern by formula.

The model: a warp's load or store takes as many wavefronts as the most-loaded of the 32 banks has distinct 4-byte words
(word w lies in bank w % 32); lanes of one word share it, and of an atomic they take turns. A wavefront is one clock of
a multiprocessor, 128 bytes. For accesses of up to 4 bytes a lane this is what the hardware does; wider ones it splits
into parts of the warp, so that there the count is a lower bound.

Each function follows the loops of one kernel in csrc/cuda (features-last activations, 16-byte pieces) and gives the
wavefronts of a whole product by purpose. Left out are what all lanes read alike (offsets of columns, lists of blocks),
warp shuffles and the join of shared strips, which uses no shared memory. Accesses that depend on where entries stand
are counted on randomly chosen blocks of SAMPLED entries and scaled; those are marked "~" in a kernel's list below,
everything else is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_csb import CSBMatrix, convert

BANKS = 32
SAMPLED = 1 << 18
# csrc/cuda/spmm/tile.cuh, TileConfig: warps along the output features and along the columns, entries of a step.
SPMM_TILE = {8: (4, 1, 1024), 32: (2, 2, 1024), 64: (2, 2, 1024), 128: (2, 2, 1536)}
UNDO_LIMIT = 512
WEIGHT_TILES = 3
THREADS = 256  # of the gather kernels
COUNTED = ("gather", "tile")
CAPACITY = 1024  # sorted entries of spmm's gather kernel

Counts = dict[str, float]


def wavefronts(words: Tensor, atomic: bool = False) -> Tensor:
    """Wavefronts of each access, [accesses], from the words ``[accesses, touched]`` that it touches, -1 for none."""
    words = words.sort(dim=1).values
    counted = words >= 0
    if not atomic:
        counted[:, 1:] &= words[:, 1:] != words[:, :-1]
    load = torch.zeros(len(words), BANKS, dtype=torch.int64)
    return load.scatter_add_(1, words.clamp_min(0) % BANKS, counted.long()).amax(1)


def _each(first: Tensor, width: int = 1, atomic: bool = False) -> Tensor:
    """wavefronts() of lanes that touch ``width`` words from the first ones, [accesses, lanes], on."""
    step = torch.arange(width)
    counts = []
    for part in first.split(max(1, (1 << 22) // (first.shape[1] * width))):
        counts.append(wavefronts(torch.where(part[..., None] >= 0, part[..., None] + step, -1).flatten(1), atomic))
    return torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64)


def _total(first: Tensor, width: int = 1, atomic: bool = False) -> float:
    return float(_each(first, width, atomic).sum())


def _accesses(key: Tensor, lane: Tensor, word: Tensor, lanes: int = 32) -> Tensor:
    """The accesses [number of keys, lanes] in which a lane touches a word."""
    unique, index = key.unique(return_inverse=True)
    table = torch.full((len(unique), lanes), -1, dtype=torch.int64)
    table[index, lane] = word
    return table


class Entries(NamedTuple):
    """Entries of some blocks: block-local row and column, code, which of the blocks, and place in it."""

    row: Tensor
    col: Tensor
    code: Tensor
    block: Tensor
    place: Tensor
    count: Tensor  # entries of each block, [blocks]
    scale: float  # all entries of the matrix over these


def block_counts(w: CSBMatrix) -> Tensor:
    """Entries of each block, int64 [mb * kb], on the host."""
    return (w.blk_ptr.long().diff() - w.blk_pad.long()).cpu()


def _sample(w: CSBMatrix, multiple: int = 1) -> Entries:
    """Entries of randomly chosen blocks. With ``multiple`` each block's are listed up to a multiple of it, its padding
    among them, as vector loads see them."""
    counts = block_counts(w)
    blocks = counts.nonzero().flatten()
    blocks = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]
    blocks = blocks[: int((counts[blocks].cumsum(0) < SAMPLED).sum()) + 1]
    count = counts[blocks]
    listed = _up(count, multiple) * multiple
    block = torch.repeat_interleave(torch.arange(len(blocks)), listed)
    place = torch.arange(len(block)) - (listed.cumsum(0) - listed)[block]
    index = w.blk_ptr.cpu().long()[blocks][block] + place
    codes = convert.entry_codes(w).view(-1, 2)[index.to(w.codes.device)].cpu()
    row, col = (part.reshape(-1).long() for part in w.layout.decode(codes))
    code = codes[:, 0].long() + 256 * codes[:, 1].long()
    return Entries(row, col, code, block, place, count, float(counts.sum()) / max(float(count.sum()), 1.0))


def _up(a, b: int):
    return -(-a // b)


class Flushes(NamedTuple):
    """Thread blocks of a column tile, and how often they write a strip of Y or their share of one."""

    thread_blocks: int
    outputs: int
    partials: int


def flushes(w: CSBMatrix, split: bool, transposed: bool) -> Flushes:
    strips, length = _up(w.k if transposed else w.m, w.block_size), _up(w.m if transposed else w.k, w.block_size)
    if not split or length == 0:
        return Flushes(strips, strips, 0)
    begin = w.units[int(transposed)].cpu().long()
    first, last = begin[:-1], begin[1:]
    first, last = first[first < last], last[first < last]
    touched = (last - 1) // length - first // length + 1
    whole = (last // length - _up(first, length)).clamp_min(0)
    return Flushes(len(first), int(whole.sum()), int((touched - whole).sum()))


def spmm_tile(w: CSBMatrix, n: int, tile_n: int, split: bool, transposed: bool) -> Counts:
    """csrc/cuda/spmm/tile.cuh. A step is up to kChunk entries of a block; c are its entries, v = ceil(c / 4) vectors.

    - copy, read: 8-byte vectors without conflicts, ceil(v / 16) each; codes are read again where the tile is undone.
    - ~scatter: thread t stores entries 4 t ... 4 t + 3 one after the other, so a store holds every fourth of 128
      entries; the word of an entry is code / 2, because a tile row is 128 bytes.
    - clean: up to 512 entries the same stores again (~), padding included; above, the tile's 8192 bytes, 64.
    - start: three tiles of 64 for each thread block.
    - X: written once, 64 x tile_n x 2 bytes; a swizzled row or column of 8 pieces hits every bank once.
    - ldmatrix: an 8 x 8 matrix is one; a warp reads its 64 / warps_m rows of W and its tile_n / warps_n columns of X.
    """
    warps_m, warps_n, chunk = SPMM_TILE[tile_n]
    tiles, counts = _up(n, tile_n), block_counts(w)
    counts = counts[counts > 0]
    full, rest = counts // chunk, counts % chunk
    steps = torch.cat([torch.full((int(full.sum()),), chunk), rest[rest > 0]])
    undone, number = steps <= UNDO_LIMIT, len(steps)
    passes = _up(_up(steps, 4), 16)

    e = _sample(w, 4)
    group = (e.block * (1 << 20) + e.place // 128) * 4 + e.place % 4
    lane, word = e.place % 128 // 4, e.code >> 1
    real = e.place < e.count[e.block]
    again = (e.count[e.block] - e.place // chunk * chunk).clamp_max(chunk) <= UNDO_LIMIT
    scatter = e.scale * _total(_accesses(group[real], lane[real], word[real]))
    undo = e.scale * _total(_accesses(group[again], lane[again], word[again]))
    per_tile = {
        "copy codes and values in": 2.0 * int(passes.sum()),
        "read codes and values": 2.0 * int(passes.sum()) + int(passes[undone].sum()),
        "scatter into the tile": scatter,
        "clean the tile": undo + 64.0 * int((~undone).sum()),
        "clear tiles at the start": 64.0 * WEIGHT_TILES * flushes(w, split, transposed).thread_blocks,
        "copy X in": float(tile_n * number),
        "ldmatrix of W": float(64 * warps_n * number),
        "ldmatrix of X": float(tile_n * warps_m * number),
    }
    return {name: tiles * count for name, count in per_tile.items()}


def spmm_gather(w: CSBMatrix, n: int, tile_n: int, split: bool, transposed: bool) -> Counts:
    """csrc/cuda/spmm/gather.cuh with the thread map of gather_config.cuh, for blocks up to 64. A step is a block.

    - ~mark: atomic OR of an entry's bit; the word is 2 out + in / 32, 32 consecutive entries an access.
    - ~sort: an entry reads its 8-byte mask and stores value and offset at its rank by (out, in), in every window of
      1024 entries; each of 8 warps reads all 64 masks, two a lane as the compiler joins them, 4; clearing them takes 4.
    - X panel: written once, 64 x tile_n accumulators without conflicts.
    - ~entries, ~X rows: a row group's entries pass one by one (dealt to the splits); lanes of a group read one entry
      and one row of tile_n accumulators, at pitch tile_n + one vector.
    - results: a strip's sums go into the panel, and out of it element by element, lanes along features for Y, along
      columns for shares (edges of Y count as whole, but for n below tile_n).
    """
    _expect_narrow(w)
    size = 2 if w.dtype == torch.float64 else 1  # words of an accumulator
    vec = min(tile_n, 4 // size)
    lanes = tile_n // vec
    groups = THREADS // lanes
    splits, rows, pairs = max(1, groups // 64), max(1, 64 // groups), 32 // lanes
    pitch = 1 if tile_n == 1 else tile_n + vec
    panel = 64 * tile_n * size / BANKS
    steps = int((block_counts(w) > 0).sum())

    e = _sample(w)
    out, inner = (e.col, e.row) if transposed else (e.row, e.col)
    rank = torch.empty_like(e.place)
    order = ((e.block * 64 + out) * 64 + inner).argsort()
    rank[order] = e.place  # places of a block are 0, 1, ... and blocks stand one after the other
    window, at = rank // CAPACITY, rank % CAPACITY
    windows = _up(e.count, CAPACITY)
    group, lane = e.block * 4096 + e.place // 32, e.place % 32
    mark = _total(_accesses(group, lane, 2 * out + (inner >> 5)), atomic=True)
    masks = _each(_accesses(group, lane, 2 * out), 2)
    masks = float((masks * windows[group.unique() // 4096]).sum())
    store = _total(_accesses(group * 8 + window, lane, at * 2 * size), 2 * size)

    # Where a row begins inside the window: the first rank of its entries there.
    row_of = (e.block * 8 + window) * 64 + out
    begin = torch.full((len(e.count) * 8 * 64,), CAPACITY).scatter_reduce_(0, row_of, at, "amin")[row_of]
    turn = at - begin
    pair = out // rows * splits + turn % splits
    key = (((e.block * 8 + window) * 8 + pair // pairs) * 64 + out % rows) * 4096 + turn // splits
    entries = _total(_accesses(key, pair % pairs, at * 2 * size, pairs), 2 * size)
    x_rows = _total(_accesses(key, pair % pairs, inner * pitch * size, pairs), tile_n * size)

    flushed = flushes(w, split, transposed)
    columns = min(n, tile_n)
    item, lanes_of = torch.arange(64 * lanes).view(-1, 1, 32), torch.arange(vec).view(1, -1, 1)
    to_y = item // 64 * vec + lanes_of, item % 64
    to_share = item % lanes + lanes_of * lanes, item // lanes
    both = (to_y, to_share)
    drain = [_total(torch.where(j < columns, f * pitch + j, -1).flatten(0, 1) * size, size) for j, f in both]
    sums = flushed.outputs + flushed.partials
    per_tile = {
        "mark entries": e.scale * mark,
        "sort entries": e.scale * (masks + store) + 4.0 * steps + 32.0 * steps,
        "write the X panel": panel * steps,
        "read entries": e.scale * entries,
        "read X rows": e.scale * x_rows,
        "results": panel * sums + drain[0] * flushed.outputs + drain[1] * flushed.partials,
    }
    return {name: _up(n, tile_n) * count for name, count in per_tile.items()}


def sddmm_tile(w: CSBMatrix, n: int, splits: int) -> Counts:
    """csrc/cuda/sddmm/tile.cuh. A thread block holds 2 x 2 blocks of W, one a warp; a step is 64 columns.

    - A and B: each 64 x 64 strip that a non-empty block needs is written once a step, 64.
    - ldmatrix: a warp with a non-empty block reads 64 rows of A and of B, 64 each.
    - dense: its 64 x 64 float sums are stored, 128, in every run of columns.
    - ~sample: lane l reads entries 8 l ... 8 l + 7 one after the other; the word of an entry is its code.
    """
    grid = (block_counts(w) > 0).view(_up(w.m, w.block_size), _up(w.k, w.block_size))
    filled = int(grid.sum())
    rows, cols = grid.shape
    grid = torch.nn.functional.pad(grid, (0, cols % 2, 0, rows % 2)).view(_up(rows, 2), 2, _up(cols, 2), 2)
    strips = int(grid.any(3).sum() + grid.any(1).sum())
    steps = _up(n, 64)
    e = _sample(w)
    key = (e.block * 64 + e.place // 256) * 8 + e.place % 8
    sample = e.scale * _total(_accesses(key, e.place % 256 // 8, e.code))
    return {
        "copy A and B in": 64.0 * strips * steps,
        "ldmatrix of A and B": 128.0 * filled * steps,
        "store the dense block": 128.0 * filled * splits,
        "sample it": splits * sample,
    }


def sddmm_gather(w: CSBMatrix, n: int, tile_n: int, splits: int) -> Counts:
    """csrc/cuda/sddmm/gather.cuh with the thread map of gather_config.cuh, for blocks up to 64.

    A block's entries are listed 512 (float64: 256) at a time; each of 32 groups of 8 lanes owns ceil(list / 32)
    neighbours, and all columns pass by in tiles.

    - list: two words an entry are written, and read by the owners (~), in every run of columns.
    - A and B: two panels of 64 x tile_n accumulators are written for every list and tile.
    - ~rows: for its k-th entry a group reads a row of B, and one of A where it differs from the one before; groups
      without a k-th entry read row 0.
    """
    _expect_narrow(w)
    size = 2 if w.dtype == torch.float64 else 1
    most = 512 // size
    pitch = tile_n + 4 // size
    counts = block_counts(w)
    rest = counts[counts % most > 0] % most
    lists = int((counts // most).sum()) + len(rest)
    written = 2.0 * (int((counts // most).sum()) * (most // 32) + int(_up(rest, 32).sum()))

    e = _sample(w)
    listed = e.block * 16 + e.place // most
    unique, index, length = listed.unique(return_inverse=True, return_counts=True)
    owned = _up(length, 32)
    # Every list again, filled up to what its 32 groups own.
    of = torch.repeat_interleave(torch.arange(len(unique)), 32 * owned)
    q = torch.arange(len(of)) - (32 * (owned.cumsum(0) - owned))[of]
    slot = (32 * (owned.cumsum(0) - owned))[index] + e.place % most
    a, b = (torch.zeros(len(of), dtype=torch.int64).index_put_((slot,), local) for local in (e.row, e.col))
    k, group = q % owned[of], q // owned[of]
    key, lane = (of * 8 + group // 4) * 16 + k, group % 4
    exists = q < length[of]
    changed = (k == 0) | (a != a.roll(1))
    read = 2.0 * _total(_accesses(key[exists], lane[exists], q[exists], 4))
    a_rows = _total(_accesses(key[changed], lane[changed], a[changed] * pitch * size, 4), tile_n * size)
    b_rows = _total(_accesses(key, lane, b * pitch * size, 4), tile_n * size)
    tiles = _up(n, tile_n)
    return {
        "list entries": splits * (written + e.scale * read),
        "write the panels of A and B": 2.0 * 64 * tile_n * size / BANKS * lists * tiles,
        "read rows of A": e.scale * a_rows * tiles,
        "read rows of B": e.scale * b_rows * tiles,
    }


def _expect_narrow(w: CSBMatrix) -> None:
    if w.block_size > 64:
        raise ValueError(f"block_size: expected at most 64 to count a gather kernel's wavefronts, got {w.block_size}")


def count(w: CSBMatrix, n: int, direction: str, kernel: str, tile_n: int, split: bool | int) -> Counts:
    """Wavefronts by purpose of a product ("F", "T" or "dW") with the planner's choice for it."""
    if kernel not in COUNTED:
        raise ValueError(f"kernel: expected one whose loops are followed here, 'gather' or 'tile', got {kernel!r}")
    if direction == "dW":
        return sddmm_tile(w, n, int(split)) if kernel == "tile" else sddmm_gather(w, n, tile_n, int(split))
    if direction not in ("F", "T"):
        raise ValueError(f"direction: expected F, T or dW, got {direction!r}")
    return (spmm_tile if kernel == "tile" else spmm_gather)(w, n, tile_n, bool(split), direction == "T")
