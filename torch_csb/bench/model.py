"""A whole net and each of its pruned layers: dense, masked by torch.nn.utils.prune, and CSB.

``dense`` holds the pruned weights with their zeros, ``masked`` multiplies them by their masks on every forward,
``csb`` went through sparsify_. On CUDA in float32 ``dense_tf32`` is the dense model with TF32 allowed (for convolutions
that is torch's default); the others run without. A layer is timed on the activations that it gets inside the net.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from torch_csb._progress import progress
from torch_csb.bench import nets, pictures
from torch_csb.bench.contest import compare
from torch_csb.bench.judge import WrongResult
from torch_csb.bench.nets import Net
from torch_csb.bench.options import add_common
from torch_csb.bench.report import Provenance, append_csv, cell, csv_path, read_csv, table

BATCHES = (1, 8, 64, 256)
# On a CPU, where a pass of MobileNet over 64 images takes seconds.
FEW_BATCHES = (1, 8)
SECONDS = {"cpu": 0.7, "cuda": 0.08}  # of sampling: for all variants of a layer, for each variant
COLOURS = {"dense": "C0", "masked": "C1", "csb": "C2", "dense_tf32": "C7"}


@dataclass
class ModelRow:
    """One variant of a net (``layer`` empty) or of a layer in it. The field order is the CSV's; empty cells are None.

    ``m``, ``k`` are the layer's weight, ``n`` the columns it multiplies (samples, or pixels of all images).
    ``weight_bytes`` counts parameters and buffers, masks and indices among them; ``ratio_to_dense`` is dense time over
    this time (above 1: faster than dense); ``rel_err`` is relative to float64 in the Frobenius norm.
    """

    date: str
    commit: str
    device: str
    torch: str
    net: str
    dtype: str
    sparsity: float
    batch: int
    layer: str
    m: int | None
    k: int | None
    n: int | None
    variant: str
    us: float
    us_spread: float
    samples_per_s: float | None
    weight_bytes: int
    ratio_to_dense: float
    rel_err: float


class Series(NamedTuple):
    """What names a net's rows: all but the batch size, the layer and the variant."""

    net: str
    dtype: str
    sparsity: float

    def __str__(self) -> str:
        return f"{self.net}, {self.dtype}, {100 * self.sparsity:g} % zeros"

    def among(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        key = (self.net, self.dtype, cell(self.sparsity))
        return [row for row in rows if (row["net"], row["dtype"], row["sparsity"]) == key]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--net", choices=nets.NETS, action="append", help="a built-in net (default: each)")
    which.add_argument("--model", help="package.module:function, called to give your nn.Module, dense or pruned")
    parser.add_argument("--input", help="beside --model: the shape of one sample, such as 3x224x224, without the batch")
    parser.add_argument("--sparsity", type=float, default=0.9, help="to prune to by magnitude what comes dense")
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtype", choices=dtypes, action="append", help="default: float32, on CUDA both")
    parser.add_argument("--batch", type=int, action="append", help=f"default: {BATCHES}, fewer on a CPU")
    parser.add_argument("--channels-last", action="store_true", help="images and their models in this memory format")
    parser.add_argument("--resume", action="store_true", help="skip what the CSV already holds for this commit")
    parser.add_argument("--dry-run", action="store_true", help="print what would be converted and timed")


def run(options: argparse.Namespace) -> int:
    provenance = Provenance.of(options.device, options.commit)
    path = csv_path(options.results, provenance.device, "model")
    dtypes = options.dtype or (["float32", "bfloat16"] if options.device == "cuda" else ["float32"])
    try:
        cases = [(net, dtype) for net in _chosen_nets(options) for dtype in dict.fromkeys(dtypes)]
        series = [_bench(net, dtype, options, provenance, path) for net, dtype in cases]
    except (WrongResult, ValueError) as error:
        print(f"\n{error}\nNothing was written of that case.")
        return 1 if isinstance(error, WrongResult) else 2
    if not options.dry_run:
        print(f"\nrows are in {path}")
        draw(
            rows_of(path, provenance),
            series,
            csv_path(options.plots, provenance.device, "model").with_suffix(".png"),
            provenance,
        )
    return 0


def rows_of(path: Path, provenance: Provenance) -> list[dict[str, str]]:
    """The rows that a CSV holds of this commit and torch."""
    key = (provenance.commit, provenance.torch)
    return [row for row in read_csv(path) if (row["commit"], row["torch"]) == key]


def _chosen_nets(options: argparse.Namespace) -> list[Net]:
    if not 0 < options.sparsity < 1:
        raise ValueError(f"--sparsity: expected a number between 0 and 1, got {options.sparsity}")
    if options.batch and min(options.batch) < 1:
        raise ValueError(f"--batch: expected at least 1, got {min(options.batch)}")
    if options.model:
        return [nets.from_import_path(options.model, nets.parse_shape(options.input) if options.input else None)]
    if options.input:
        raise ValueError("--input: expected it beside --model only, the built-in nets have their own")
    return [nets.NETS[name] for name in options.net or nets.NETS]


def _bench(net: Net, dtype: str, options: argparse.Namespace, provenance: Provenance, path: Path) -> Series:
    """Times a net in a dtype. The rows of a batch size are appended together, when all of them are there and right."""
    device = options.device
    model, sparsity = nets.make_pruned(net, options.sparsity, device, options.seed)
    last = options.channels_last and len(net.sample) == 3
    memory_format = torch.channels_last if last else torch.preserve_format
    model = model.to(getattr(torch, dtype), memory_format=memory_format)
    series = Series(net.name + " channels_last" * last, dtype, sparsity)
    report = nets.would_convert(model, device)
    layers = nets.converted_layers(report, net.name)
    few = device == "cpu" and net.name != "mlp"
    batches = sorted(set(options.batch or (FEW_BATCHES if few else BATCHES)))
    if options.resume:
        done = {row["batch"] for row in series.among(rows_of(path, provenance))}
        if skipped := [batch for batch in batches if str(batch) in done]:
            print(f"{series}, batch {skipped}: skipped, {path} holds them")
            batches = [batch for batch in batches if batch not in skipped]
    print(f"\n{series}, batch {batches}, {len(layers)} layers, {provenance.device}", flush=True)
    if options.dry_run:
        print(f"would time dense, masked and csb: the net and each converted layer\n{report}")
    if options.dry_run or not batches:
        return series

    variants = nets.make_variants(model, layers, device)
    rows: list[ModelRow] = []
    for batch, layer in progress([(b, layer) for b in batches for layer in ("", *layers)], net.name, "timings"):
        if not layer:
            x = net.example(batch, device, getattr(torch, dtype), options.seed).clone(memory_format=memory_format)
            inputs, of_batch = nets.layer_inputs(variants["dense"], list(layers), x) | {"": x}, []
        parts = {name: variant.get_submodule(layer) for name, variant in variants.items()}
        what = f"{series}, batch {batch}, {layer or 'whole net'}"
        elements, measured = compare(parts, inputs.pop(layer), device, what, SECONDS[device])
        m, k = layers.get(layer, (None, None))
        for variant, (timing, error) in measured.items():
            place = {"batch": batch, "layer": layer, "m": m, "k": k, "n": elements // m if m else None}
            numbers = {"us": timing.us, "us_spread": timing.us_spread, "rel_err": error}
            numbers["samples_per_s"] = None if layer else 1e6 * batch / timing.us
            numbers["ratio_to_dense"] = measured["dense"][0].us / timing.us
            numbers["weight_bytes"] = nets.weight_bytes(parts[variant.removesuffix("_tf32")])
            of_batch.append(ModelRow(**provenance.stamp(), **series._asdict(), variant=variant, **place, **numbers))
        if not inputs:
            append_csv(of_batch, path)
            rows += of_batch
            if device == "cuda":
                torch.cuda.empty_cache()  # a graph's memory serves no other graph
    _print(rows)
    return series


def _print(rows: list[ModelRow]) -> None:
    """A line for each layer and batch size with its variants side by side, then the whole nets."""
    variants = list(dict.fromkeys(row.variant for row in rows))
    lines = []
    for batch, layer in dict.fromkeys((row.batch, row.layer) for row in rows):
        of = {row.variant: row for row in rows if (row.batch, row.layer) == (batch, layer)}
        csb = of["csb"]
        line = {"batch": batch, "layer": layer or "whole net", "shape": f"{csb.m}x{csb.k}" if layer else "", "n": csb.n}
        line |= {f"{name} µs": of[name].us for name in variants}
        lines.append(SimpleNamespace(**line, **{"dense/csb": csb.ratio_to_dense, "rel_err": csb.rel_err}))
    print(table(lines, tuple(vars(lines[0]))))
    for row in rows:
        if not row.layer:
            speed = f"{row.samples_per_s:,.0f} samples/s, {row.ratio_to_dense:.2f} x dense"
            print(f"batch {row.batch}, {row.variant}: {speed}, weights {row.weight_bytes / 2**20:,.2f} MiB")
    losing = sum(line.__dict__["dense/csb"] < 1 for line in lines)
    print(f"dense is faster than csb in {losing} of {len(lines)} lines")


def draw(rows: list[dict[str, str]], series: list[Series], target: Path, provenance: Provenance) -> None:
    """Throughput over batch size for each series, and below it relative to dense."""
    figure = pictures.new_figure(1 + 4 * len(series), 6)
    if figure is None:
        return
    axes = figure.subplots(2, len(series), sharex="col", squeeze=False, height_ratios=[2, 1])
    for (above, below), one in zip(axes.T, series, strict=True):
        # A later measurement of the same point replaces an earlier one.
        nets_alone = [row for row in one.among(rows) if not row["layer"]]
        points = {(row["variant"], int(row["batch"])): row for row in nets_alone}
        for variant in dict.fromkeys(variant for variant, _ in points):
            batches = sorted(batch for name, batch in points if name == variant)
            for axis, column in ((above, "samples_per_s"), (below, "ratio_to_dense")):
                numbers = [float(points[variant, batch][column]) for batch in batches]
                axis.plot(batches, numbers, marker="o", label=variant, color=COLOURS[variant])
        ticks = sorted({batch for _, batch in points})
        below.axhline(1.0, color="black", linewidth=0.8)
        below.set(xlabel="batch size", ylabel="throughput, dense = 1", ylim=(0, None), xscale="log")
        below.set_xticks(ticks, ticks)
        below.minorticks_off()
        above.set(title=str(one), ylabel="samples/s", yscale="log")
        above.legend(frameon=False)
    figure.suptitle(f"Inference of whole nets, {provenance.device}, commit {provenance.commit}")
    pictures.save(figure, target)
