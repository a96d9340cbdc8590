"""How full the blocks of a matrix are: numbers, a map for a terminal, a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_csb.matrix import CSBMatrix

# From an empty cell to the fullest.
SHADES = " .:-=+*#%@"
_PANELS = 4  # beside each other


def _edges(size: int, block_size: int) -> Tensor:
    """Rows (or columns) of each block row; the last may be cut."""
    count = -(-size // block_size)
    full = torch.full((count,), block_size, dtype=torch.int64)
    if count:
        full[-1] = size - (count - 1) * block_size
    return full


def counts(w: CSBMatrix) -> Tensor:
    """int64 ``[mb, kb]``: nonzeros of each block of an untransposed matrix on the host."""
    mb, kb = -(-w.m // w.block_size), -(-w.k // w.block_size)
    return (w.blk_ptr.diff().long() - w.blk_pad.long()).view(mb, kb)


def shares(w: CSBMatrix, rows: int | None = None, columns: int | None = None) -> Tensor:
    """float64: the share of elements that are stored in each block, or in rows × columns cells of several blocks."""
    nonzeros = counts(w).double()
    area = torch.outer(_edges(w.m, w.block_size), _edges(w.k, w.block_size)).double()
    mb, kb = nonzeros.shape
    rows, columns = min(rows or mb, mb), min(columns or kb, kb)
    cell_row, cell_col = torch.arange(mb) * rows // max(mb, 1), torch.arange(kb) * columns // max(kb, 1)

    def summed(blocks: Tensor) -> Tensor:
        cells = torch.zeros(rows, columns, dtype=torch.float64)
        return cells.index_put_((cell_row[:, None], cell_col[None, :]), blocks, accumulate=True)

    return summed(nonzeros) / summed(area).clamp_min(1)


def text_map(w: CSBMatrix, width: int = 64, height: int = 16) -> list[str]:
    """Lines of at most ``width + 2`` characters. A character is twice as high as wide, so fewer lines than columns."""
    mb, kb = counts(w).shape
    if mb == 0 or kb == 0:
        return ["(no block)"]
    shrink = max(kb / width, mb / 2 / height, 1)
    columns, rows = max(1, math.floor(kb / shrink)), max(1, math.floor(mb / 2 / shrink))
    # A few blocks are shown each as two characters, which is a square.
    wide = 2 if mb <= height and 2 * kb <= width else 1
    if wide == 2:
        columns, rows = kb, mb
    cells = shares(w, rows, columns)
    fullest = float(cells.max())
    lines = []
    for row in cells.tolist():
        ranks = [math.ceil(cell / fullest * (len(SHADES) - 1)) if cell else 0 for cell in row]
        lines.append("|" + "".join(SHADES[rank] * wide for rank in ranks) + "|")
    legend = f"'{SHADES[-1]}' is {100 * fullest:.3g} % of the elements stored, '{SHADES[1]}' at most a ninth of that"
    return [*lines, legend if fullest else "no element is stored"]


def draw(layers: dict[str, CSBMatrix], picture: Path) -> None:
    """A panel for each layer, a cell for each block.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--picture draws with matplotlib: pip install matplotlib") from error
    columns = min(_PANELS, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 3.3 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(layers) :]:
        axes.set_axis_off()
    for axes, (name, w) in zip(panels.flat, layers.items(), strict=False):
        _panel(figure, axes, name, w)
    figure.suptitle("share of each block's elements that is stored (white: none)")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def _panel(figure: Any, axes: Any, name: str, w: CSBMatrix) -> None:
    short = name if len(name) <= 36 else "…" + name[-35:]
    axes.set_title(f"{short}\n{w.m} × {w.k}, {100 * w.sparsity:.1f} % zeros, blocks of {w.block_size}", fontsize=8)
    cells = 100 * shares(w)
    if not cells.numel():
        axes.set_axis_off()
        return
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["viridis_r"].with_extremes(under="white")
    # Above 0, or an empty block would have the colour of a nearly empty one.
    image = axes.imshow(
        cells.numpy(), cmap=colours, vmin=1e-9, vmax=max(float(cells.max()), 1e-6), interpolation="nearest"
    )
    mb, kb = cells.shape
    # Long strips would be lines of a pixel.
    axes.set_aspect("equal" if max(mb, kb) <= 6 * min(mb, kb) else "auto")
    axes.set_xlabel("block column", fontsize=7)
    axes.set_ylabel("block row", fontsize=7)
    axes.tick_params(labelsize=6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    bar = figure.colorbar(image, ax=axes, format="%.3g %%", shrink=0.8)
    bar.ax.tick_params(labelsize=6)
