"""The bottleneck study of one product: bytes, blocks, work units, shared-memory wavefronts, time and limit.

Activations have their features last. Everything printed is also drawn (matplotlib) and, with --json, written.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_csb import CSBMatrix, explain
from torch_csb.bench import limits, options, pictures, report, wavefronts
from torch_csb.bench.cases import DTYPES, Case, Weights
from torch_csb.bench.implementations import IMPLEMENTATIONS
from torch_csb.bench.patterns import PATTERNS
from torch_csb.bench.sweep import Bench
from torch_csb.explain import Step
from torch_csb.testing import read_smtx

DIRECTIONS = {"F": "Y = W.X", "T": "dX = W^T.dY", "dW": "dW = dY.X^T at W's entries"}
# Thread blocks that a multiprocessor holds at once, as csrc/plan/cuda_config.cpp counts them.
BLOCKS_PER_MULTIPROCESSOR = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_common(parser)
    parser.add_argument("--shape", type=options.shape, default=(4096, 4096), help="of W, MxK (default: 4096x4096)")
    parser.add_argument("--sparsity", type=options.fraction, default=0.9)
    parser.add_argument("--pattern", choices=PATTERNS, default="uniform")
    parser.add_argument("--smtx", type=options.existing_file, help="the pattern of this file instead")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--n", type=options.positive, default=64, help="columns of the activations")
    parser.add_argument("--direction", choices=DIRECTIONS, default="F")
    parser.add_argument("--clock", type=options.positive, help="MHz of a multiprocessor (default: the GPU's highest)")
    parser.add_argument("--json", type=Path, help="writes every number there")


class File:
    """Stands for the collection of matrices where there is a single file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mask(self, pattern: str, device: str) -> Tensor:
        return read_smtx(self.path).to(device)


def array_bytes(w: CSBMatrix, n: int, workspace: int) -> dict[str, int]:
    """Bytes of every array of a product; the first five are W's. Of dW, ``values`` are the gradients written."""
    held = {name: getattr(w, name).nbytes for name in ("values", "codes", "blk_ptr", "blk_pad", "units")}
    item = w.values.element_size()
    return {**held, "X": w.k * n * item, "Y": w.m * n * item, "partials": workspace}


def flops_done(w: CSBMatrix, n: int, step: Step) -> float:
    """Operations that the kernel executes: on tensor cores every element of a non-empty block, in whole tiles."""
    if step.kernel == "panel":
        return 2.0 * w.m * w.k * n
    columns = -(-n // step.tile_n) * step.tile_n if step.kernel != "cpu" else n
    if step.kernel in ("tile", "narrow", "wide", "bitmap"):
        return 2.0 * 64 * 64 * columns * int((wavefronts.block_counts(w) > 0).sum())
    return 2.0 * w.nnz * columns


def unit_nonzeros(w: CSBMatrix, column_major: bool) -> Tensor:
    from torch_csb import _plan

    mb, kb = -(-w.m // w.block_size), -(-w.k // w.block_size)
    arrays = (array.cpu().numpy() for array in (w.blk_ptr, w.blk_pad))
    begin = w.units[int(column_major)].cpu().numpy()
    return torch.from_numpy(_plan.unit_nonzeros(*arrays, mb, kb, begin, column_major))


def region_nonzeros(w: CSBMatrix) -> Tensor:
    """Nonzeros of every region of 4 x 4 blocks, as the kernel of that name cuts W."""
    blocks = 4
    counts = wavefronts.block_counts(w).view(-(-w.m // w.block_size), -1)
    rows, cols = counts.shape
    counts = F.pad(counts, (0, -cols % blocks, 0, -rows % blocks))
    return counts.unflatten(0, (-1, blocks)).unflatten(2, (-1, blocks)).sum((1, 3)).flatten()


def imbalance(w: CSBMatrix, direction: str, step: Step, slots: int, n: int) -> float:
    """How much longer the busiest thread block (CPU: task) works than an even share of the chip, at least 1.

    Formula: its nonzeros times the thread blocks at work at once, over all nonzeros; at work at once are as many as
    there are, up to ``slots``. Where there are many more than slots, later ones fill the gaps and nothing is lost.
    """
    if step.kernel == "panel":
        return 1.0
    if direction == "dW":
        if step.kernel == "tile":  # spends the same on every block, whatever it holds
            work = (wavefronts.block_counts(w) > 0).long()
        else:
            work = region_nonzeros(w) if step.kernel == "region" else unit_nonzeros(w, False)
        repeats = int(step.split)
    else:
        if step.split:
            work = unit_nonzeros(w, direction == "T")
        else:
            counts = wavefronts.block_counts(w).view(-(-w.m // w.block_size), -1)
            work = counts.sum(0 if direction == "T" else 1)
        repeats = -(-n // step.tile_n)
    busy = min(len(work) * repeats, slots)
    return max(1.0, work.max().item() * busy / (work.sum().item() * repeats))


def study(bench: Bench, case: Case, where: report.Provenance, clock_mhz: int | None) -> dict[str, Any]:
    """Every number of the study. Raises WrongResult where a timed result differs from float64."""
    n, direction, dtype, device = case.n, case.direction, case.weights.dtype, bench.device
    w = IMPLEMENTATIONS["csb"].pack(bench.dense, direction)
    step = explain(w, n).steps[list(DIRECTIONS).index(direction)]
    counts = wavefronts.block_counts(w)
    found: dict[str, Any] = {"m": w.m, "k": w.k, "n": n, "dtype": dtype, "direction": direction, "nnz": w.nnz}
    found |= {"pattern": case.weights.pattern, "sparsity": w.sparsity, "block_size": w.block_size}
    found["step"], found["bytes"] = asdict(step), array_bytes(w, n, step.workspace)
    spread = (counts.min(), counts.double().mean(), counts.median(), counts.max(), (counts == 0).sum())
    found["blocks"] = dict(zip(("min", "mean", "median", "max", "empty"), (s.item() for s in spread), strict=True))
    found["blocks"]["number"] = len(counts)
    walks = {name: unit_nonzeros(w, name == "column-major") for name in ("row-major", "column-major")}
    found["units"] = {
        name: {"number": len(units), "max_over_mean": (units.max() / units.double().mean()).item()}
        for name, units in walks.items()
    }

    most = limits.measure_limits(device, (dtype,))
    rows = {row.impl: row for row in bench.measure(case, most, where, None, print)}
    tiny = Weights(8, 8, dtype, "uniform", 0.0)
    floor = Bench(tiny, device, 0).measure(replace(case, weights=tiny, n=1), most, where, 0.05, print)
    for number in ("us", "us_spread", "rel_err"):
        found[number] = {name: getattr(row, number) for name, row in rows.items()}
    moved = sum(found["bytes"].values()) - step.workspace
    found["ceilings"] = {"bytes_per_s": most.bytes_per_s, "flops": most.flops[dtype]}
    found["limit_us"] = most.us(dtype, moved, 2.0 * w.nnz * n)
    times = {"memory": most.us(dtype, moved, 0), "arithmetic": most.us(dtype, 0, flops_done(w, n, step))}
    slots = torch.get_num_threads()
    if device == "cuda":
        chip = torch.cuda.get_device_properties(w.device)
        slots = BLOCKS_PER_MULTIPROCESSOR * chip.multi_processor_count
        if step.kernel in wavefronts.COUNTED:
            found["wavefronts"] = wavefronts.count(w, n, direction, step.kernel, step.tile_n, step.split)
        found["clock_mhz"] = clock_mhz or getattr(chip, "clock_rate", 0) / 1e3
        if found["clock_mhz"] and "wavefronts" in found:
            total = sum(found["wavefronts"].values())
            times["shared memory"] = total / (chip.multi_processor_count * found["clock_mhz"])
    found["imbalance"] = imbalance(w, direction, step, slots, n)
    times["imbalance"] = (found["imbalance"] - 1) * max(times.values())
    times["launch"] = min(row.us for row in floor if row.impl == "csb")
    found["times_us"], found["bound_by"] = times, max(times, key=times.__getitem__)
    return found


def show(found: dict[str, Any]) -> str:
    us, step, total = found["us"], found["step"], sum(found["bytes"].values())
    lines = [f"kernel    {step['kernel']}, {step['tile_n']} columns a tile, split {step['split']}: {step['reason']}"]
    lines += ["", "bytes"]
    lines += [f"  {name:<10}{size:>14,}{size / total:>8.1%}" for name, size in found["bytes"].items()]
    b = found["blocks"]
    lines += [
        "",
        f"blocks    {b['number']:,} of {found['block_size']} x {found['block_size']}, {b['empty']:,} of them empty; "
        f"nonzeros of one: min {b['min']}, mean {b['mean']:.1f}, median {b['median']}, max {b['max']}",
    ]
    for name, units in found["units"].items():
        lines.append(f"units     {units['number']} {name}: the heaviest has {units['max_over_mean']:.2f} of the mean")
    if "clock_mhz" in found and "wavefronts" not in found:
        lines += ["", f"shared-memory wavefronts are not counted for the kernel {step['kernel']}"]
    if "wavefronts" in found:
        lines += ["", f"shared-memory wavefronts{'a nonzero':>24}"]
        spent = found["wavefronts"]
        for name, count in {**spent, "all": sum(spent.values())}.items():
            lines.append(f"  {name:<30}{count / found['nnz']:>16.3f}")
        if not found["clock_mhz"]:
            lines.append("  this torch does not tell the GPU's clock: give --clock MHZ to have their time")
    top = found["ceilings"]
    lines += ["", f"time      {'us':>10}{'spread':>9}{'rel. error':>12}"]
    for name in us:
        lines.append(f"  {name:<8}{us[name]:>10.2f}{found['us_spread'][name]:>9.2f}{found['rel_err'][name]:>12.2e}")
    lines += [
        f"  CSB is {us['dense'] / us['csb']:.2f} times as fast as dense and reaches "
        f"{found['limit_us'] / us['csb']:.1%} of the limit, {found['limit_us']:.2f} us "
        f"(measured ceilings: {top['bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"{top['flops'] / 1e12:.3g} TFLOP/s)",
        "",
        "what each part alone would take, in us",
        *(f"  {name:<14}{time:>10.2f}" for name, time in found["times_us"].items()),
        "",
        _verdict(found),
    ]
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    part, us = found["bound_by"], found["us"]["csb"]
    time = found["times_us"][part]
    what = {
        "memory": "memory: reading and writing every array once takes",
        "arithmetic": "arithmetic: the operations that the kernel executes take",
        "shared memory": "shared memory: its wavefronts take",
        "imbalance": f"imbalance: the busiest thread block has {found['imbalance']:.2f} of an even share, which adds",
        "launch": "the launch floor: the same product by an 8 x 8 weight takes",
    }[part]
    rest = "" if time > us / 2 else "; no part alone explains the time: the rest is latency and what does not overlap"
    return f"bound by {what} {time:.2f} of {us:.2f} us ({time / us:.0%}){rest}"


def draw(w: CSBMatrix, title: str, picture: Path) -> None:
    """Nonzeros of each block as a map and a histogram, and of each work unit."""
    figure = pictures.new_figure(15, 4.6)
    if figure is None:
        return
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    counts, size = wavefronts.block_counts(w).view(-(-w.m // w.block_size), -1), w.block_size
    shown, cell = counts.float(), max(1, -(-max(counts.shape) // 512))
    if cell > 1:
        shown = F.max_pool2d(shown[None], cell, ceil_mode=True)[0]
    rows, cols = (count * cell * size for count in shown.shape)
    figure.suptitle(title)
    blocks, histogram, units = figure.subplots(1, 3)
    image = blocks.imshow(shown.numpy(), cmap="viridis", vmin=0, aspect="auto", extent=(0, cols, rows, 0))
    figure.colorbar(image, ax=blocks, label="nonzeros" + (f" (most of {cell} x {cell} blocks)" if cell > 1 else ""))
    blocks.set(title=f"block occupancy, blocks of {size}", xlabel="column of W", ylabel="row of W")
    blocks.set(xlim=(0, w.k), ylim=(w.m, 0))
    histogram.hist(counts.flatten().numpy(), bins=60, color="#0072B2")
    histogram.set(title="nonzeros per block", xlabel="nonzeros", ylabel="blocks", yscale="log")
    histogram.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    histogram.yaxis.set_minor_formatter(NullFormatter())
    for column_major, name, color in ((False, "row-major", "#D55E00"), (True, "column-major", "#0072B2")):
        work = unit_nonzeros(w, column_major).double().sort(descending=True).values
        label = f"{name}: max {work.max() / work.mean():.2f}"
        units.stairs((work / work.mean()).numpy(), color=color, label=label, linewidth=1.6)
    units.axhline(1, color="black", linewidth=0.8)
    units.set(title="work-unit balance", xlabel="work unit, heaviest first", ylabel="nonzeros over the mean")
    units.set_ylim(bottom=0)
    units.legend()
    pictures.save(figure, picture)


def run(options: argparse.Namespace) -> int:
    m, k, pattern, sparsity, collection = *options.shape, options.pattern, options.sparsity, None
    if options.smtx is not None:
        mask, collection = read_smtx(options.smtx), File(options.smtx)
        (m, k), sparsity = mask.shape, round(1 - mask.double().mean().item(), 4)
        pattern = "dlmc:" + options.smtx.name.split(".smtx")[0]
    weights = Weights(m, k, options.dtype, pattern, sparsity)
    case = Case("profile", weights, options.n, options.direction, ("last",), ("csb", "dense"))
    where = report.Provenance.of(options.device, options.commit)
    title = f"{DIRECTIONS[case.direction]}: {case}\n"
    title += f"{where.device}, torch {where.torch}, commit {where.commit or 'unknown'}"
    print(title + "\n")
    with torch.no_grad():
        bench = Bench(weights, options.device, options.seed, collection)
        if not bench.dense.any():
            raise ValueError(f"{case}: expected at least one nonzero to profile, got none")
        found = study(bench, case, where, options.clock)
    print(show(found))

    name = f"profile-{m}x{k}-{pattern.removeprefix('dlmc:')}-{sparsity:g}-{options.dtype}-n{case.n}-{case.direction}"
    picture = report.csv_path(options.plots, where.device, name).with_suffix(".png")
    print()
    draw(IMPLEMENTATIONS["csb"].pack(bench.dense, case.direction), title, picture)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**where.stamp(), **found}, indent=1))
        print(f"written to {options.json}")
    return 0
