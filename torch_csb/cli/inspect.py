"""A table of the CSB layers of FILE or MODULE, and how full their blocks are."""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path

from torch_csb.cli.occupancy import draw, text_map
from torch_csb.cli.source import open_source
from torch_csb.matrix import CSBMatrix
from torch_csb.nn.report import human_bytes

_MAPS = 8
_PANELS = 48
HEAD = (
    "layer", "shape", "nnz", "zeros", "dtype", "block", "encoding", "values", "indices", "padding", "plan", "in all",
    "of dense", "of CSR",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="FILE|MODULE",
        help="a file of torch_csb.save, a state_dict of torch.save, or package.module:name of a model or of a callable "
        "that makes one",
    )
    parser.add_argument("--layers", metavar="PATTERN", default="*", help="only these, as in 'encoder.*.out'")
    parser.add_argument("--picture", metavar="PNG", type=Path, help="draw the occupancy of every block (matplotlib)")
    parser.add_argument("--no-maps", action="store_true", help="print the table alone")


def run(options: argparse.Namespace) -> int:
    source = open_source(options.source)
    layers = {name: w for name, w in source.layers.items() if fnmatch.fnmatchcase(name, options.layers)}
    if not layers and not source.shapeless:
        if source.layers:
            raise ValueError(f"--layers {options.layers}: matches none of {', '.join(source.layers)}")
        print(f"{options.source}: no CSB layer, {human_bytes(source.rest)} in other tensors")
        print("`python -m torch_csb convert` makes CSB layers of a checkpoint with zeros, sparsify_ those of a model")
        return 0
    if layers:
        print(table(layers))
    if source.shapeless:
        print(f"no shape is known of {', '.join(source.shapeless)}: a state_dict alone doesn't have it, nor has a file")
        print("of an older version; load it into its model and write it with torch_csb.save")
    print(f"other tensors: {human_bytes(source.rest)}")
    if not options.no_maps:
        for name, w in list(layers.items())[:_MAPS]:
            print(f"\n{name}: {w.m} x {w.k} in blocks of {w.block_size}")
            print("\n".join(text_map(w)))
        if len(layers) > _MAPS:
            print(f"\n{len(layers) - _MAPS} more maps are left out: --layers PATTERN chooses, --picture draws all")
    if options.picture is not None:
        drawn = dict(list(layers.items())[:_PANELS])
        if not drawn:
            raise ValueError("--picture: there is no layer of known shape to draw")
        draw(drawn, options.picture)
        left = f", the first {_PANELS} of {len(layers)} layers" if len(layers) > _PANELS else ""
        print(f"\ndrawn: {options.picture}{left}")
    return 0


def sizes(w: CSBMatrix) -> dict[str, int]:
    """Bytes. The first four sum up to ``w.nbytes``; ``dense`` and ``csr`` (32-bit indices) are for comparison."""
    item, pads = w.values.element_size(), int(w.blk_pad.sum())
    pad_codes = 2 * pads if w.layout.encoding == "codes" else 0
    return {
        "values": w.nnz * item,
        "indices": w.codes.nbytes - pad_codes + w.blk_ptr.nbytes + w.blk_pad.nbytes,
        "padding": pads * item + pad_codes,
        "plan": 4 * w.units.numel(),
        "dense": w.m * w.k * item,
        "csr": w.nnz * (item + 4) + 4 * (w.m + 1),
    }


def table(layers: dict[str, CSBMatrix]) -> str:
    rows, total = [], dict.fromkeys(("values", "indices", "padding", "plan", "dense", "csr"), 0)
    nnz = elements = 0
    for name, w in layers.items():
        size = sizes(w)
        total = {key: total[key] + size[key] for key in total}
        nnz, elements = nnz + w.nnz, elements + w.m * w.k
        dtype = str(w.dtype).removeprefix("torch.")
        about = (f"{w.m}x{w.k}", f"{w.nnz:,}", f"{100 * w.sparsity:.2f} %", dtype, str(w.block_size), w.layout.encoding)
        rows.append((name, *about, *_cells(size)))
    zeros = f"{100 * (1 - nnz / elements):.2f} %" if elements else ""
    noun = "layer" if len(rows) == 1 else "layers"
    sums = (f"{len(rows)} {noun}", "", f"{nnz:,}", zeros, "", "", "", *_cells(total))
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, sums, strict=True)]
    lines = [_line(row, widths) for row in (HEAD, *rows, sums)]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _cells(size: dict[str, int]) -> tuple[str, ...]:
    held = size["values"] + size["indices"] + size["padding"] + size["plan"]

    def share(part: int, whole: int) -> str:
        return f"{100 * part / whole:.1f} %" if whole else ""

    padding = f"{human_bytes(size['padding'])} ({share(size['padding'], held)})"
    plan = f"{human_bytes(size['plan'])} ({share(size['plan'], held)})"
    ratios = (share(held, size["dense"]), share(held, size["csr"]))
    return (human_bytes(size["values"]), human_bytes(size["indices"]), padding, plan, human_bytes(held), *ratios)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first = f"{cells[0]:<{widths[0]}}"
    return "  ".join([first, *(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))]).rstrip()
