"""Convert a dense checkpoint with zeros or pruning masks to a file that torch_csb.load_into reads."""

from __future__ import annotations

import argparse
import fnmatch
import os
from pathlib import Path

from torch_csb._files.read import read
from torch_csb._progress import progress
from torch_csb.cli._state_dict import Converted, Options, convert_state
from torch_csb.cli.source import csb_prefixes, shapes_of
from torch_csb.io import save_state
from torch_csb.nn.report import human_bytes

_KEPT_METADATA = ("format", "format_version", "aliases", "shapes", "crc32", "crc32_of_metadata")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", type=Path, help="safetensors, or a state_dict of torch.save")
    parser.add_argument("destination", metavar="OUT", type=Path, help="the safetensors file to write")
    parser.add_argument(
        "--min-sparsity",
        type=_share,
        default="auto",
        metavar="SHARE",
        help="convert weights with at least this share of zeros; the default asks for 0.5 and fewer bytes than dense",
    )
    parser.add_argument(
        "--batch", type=_columns, metavar="N", help="keep weights that would be faster dense at this many columns"
    )
    parser.add_argument("--target", choices=("auto", "cpu", "cuda"), default="auto", help="where the model will run")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="LAYER", help="keep it dense; may be a pattern, and repeated"
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="LAYER",
        help="convert what its name or a tie would keep dense",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be converted and how large it gets")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _share(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        number = 0.0 if text == "auto" else -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected 'auto' or a number from 0 to 1, got {text!r}")
    return "auto" if text == "auto" else number


def _columns(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of columns, at least 1, got {text!r}")
    return number


def run(options: argparse.Namespace) -> int:
    source, destination = options.source, options.destination
    exists = destination.exists()
    if exists and not (options.force or options.dry_run):
        raise FileExistsError(f"{destination}: exists already; --force replaces it")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"{destination}: there is no folder {destination.parent}")
    if destination.is_dir():
        raise IsADirectoryError(f"{destination}: expected a file to write, got a folder")
    try:
        contents = read(source)
        done = _convert(contents.tensors, options)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    print(done.report)
    if not done.report.converted:
        raise ValueError(
            f"{source}: nothing to convert, so nothing is written; the table says why, --min-sparsity and --include "
            "ask for more"
        )
    known = shapes_of(contents.metadata)
    metadata = {key: text for key, text in contents.metadata.items() if key not in _KEPT_METADATA}
    before = source.stat().st_size
    if options.dry_run:
        after = _bytes(done)
        print(
            f"{source}: {human_bytes(before)}; {destination} would take about {human_bytes(after)}; nothing is written"
        )
        if exists and not options.force:
            print(f"{destination}: exists already; --force would be needed")
        return 0
    save_state(done.state, {**known, **done.shapes}, destination, metadata)
    after = destination.stat().st_size
    print(f"{source}: {human_bytes(before)}; {destination}: {human_bytes(after)}")
    print(f"torch_csb.load_into(model, {os.fspath(destination)!r}) loads it into a model with the same names")
    return 0


def _convert(state: dict[str, object], options: argparse.Namespace) -> Converted:
    if csb := csb_prefixes(state):
        print(f"compressed already: {', '.join(prefix.removesuffix('.') for prefix in csb)}")
    chosen = Options(options.min_sparsity, options.batch, options.target, options.include, options.exclude)
    for what in ("include", "exclude"):
        for pattern in getattr(chosen, what):
            _check_pattern(what, pattern, state)
    names = progress(list(state), "packing", "tensors", show=False if options.quiet else None)
    return convert_state(state, chosen, names)


def _check_pattern(what: str, pattern: str, state: dict[str, object]) -> None:
    layers = {name.rpartition(".")[0] for name in state}
    if not any(fnmatch.fnmatchcase(layer, pattern) for layer in layers):
        raise ValueError(f"--{what} {pattern}: matches no layer of the checkpoint")


def _bytes(done: Converted) -> int:
    """Of the tensors, tied ones once; the header comes on top."""
    distinct = {(t.data_ptr(), t.shape, t.dtype) if t.numel() else id(t): t for t in done.state.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
