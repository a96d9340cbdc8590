"""Pictures of the timing regimes' CSVs: the speed beside dense over the sparsity."""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch_csb.bench import options, pictures
from torch_csb.bench.report import is_regime, newest, read_csv

# Okabe and Ito's colours, told apart by the colour-blind too; what is not named here takes a spare one.
STYLES = {
    "csb": ("#D55E00", "o"),
    "torch_csr": ("#0072B2", "s"),
    "csr_row_split": ("#56B4E9", "^"),
    "csr_merge": ("#009E73", "v"),
    "csr_row_swizzle": ("#CC79A7", "D"),
    "csr_sddmm": ("#E69F00", "P"),
    "dense_tf32": ("#7F7F7F", "X"),
}
PATTERN_STYLES = {
    "powerlaw": ("#D55E00", "o"),
    "full_row": ("#0072B2", "s"),
    "full_col": ("#009E73", "^"),
    "half_empty": ("#CC79A7", "D"),
}
SPARE = (("#F0E442", "*"), ("#882255", "h"), ("#332288", "<"), ("#117733", ">"))
FASTER, SLOWER = "times as fast as dense", "time over that of the uniform pattern"
DTYPES = ("bfloat16", "float16", "float32", "float64")
DIRECTIONS = ("F", "T", "dW")


class Point(NamedTuple):
    """A number to draw: its panel, its line, where it stands, and which shape or matrix it is of."""

    row: tuple[str, str]  # (dtype, direction)
    column: str | int  # n, or a model
    line: str  # implementation or pattern
    sparsity: float
    ratio: float
    case: tuple


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_common(parser)
    parser.add_argument("csv", nargs="*", type=Path, help="files to draw (default: all below --results)")


def run(options: argparse.Namespace) -> int:
    missing = [path for path in options.csv if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"csv: expected files, got {', '.join(map(str, missing))}")
    for path in options.csv or sorted(options.results.glob("*/*.csv")):
        picture = options.plots / path.parent.name / f"{path.stem}.png"
        if not is_regime(path):
            if options.csv:
                print(f"{path}: not a timing regime's columns, so there is nothing to draw")
            continue
        draw_regime(path, picture)
    return 0


def draw_regime(csv: Path, picture: Path) -> bool:
    """Draws ``ratio_to_dense`` of a regime's newest rows over the sparsity, on a log-2 axis.

    A panel for each (dtype, direction) and n; a line for each implementation is the geometric mean over the shapes, the
    points are the shapes. Matrices of the collection get a panel for each model instead of n. Where an implementation
    was measured in several layouts the faster counts. Other patterns than "uniform" are drawn beside ``picture`` as
    ``<name>-patterns.png``: the time of CSB over its time on the uniform pattern.

    Returns False, and says why, where there is no matplotlib or nothing to draw.
    """
    rows = newest(read_csv(csv))
    uniform = _points((r for r in rows if r["pattern"] == "uniform"), lambda r: int(r["n"]))
    collection = _points((r for r in rows if r["pattern"].startswith("dlmc:")), _model)
    if not (uniform or collection):
        print(f"{csv}: no row has a ratio to dense, so no picture was drawn")
        return False
    title = _title(csv.stem, rows)
    if not _figure(uniform or collection, picture, title, FASTER, STYLES, lambda c: f"n = {c}" if uniform else str(c)):
        return False
    if uniform and collection:
        _figure(collection, _beside(picture, "dlmc"), title, FASTER, STYLES, str)
    patterns = _pattern_points(rows)
    if patterns:
        title += ": CSB by pattern"
        _figure(patterns, _beside(picture, "patterns"), title, SLOWER, PATTERN_STYLES, "n = {}".format)
    return True


def _model(row: dict[str, str]) -> str:
    return row["pattern"].removeprefix("dlmc:").split("/")[0]


def _points(rows: Iterable[dict[str, str]], column: Callable[[dict[str, str]], str | int]) -> list[Point]:
    """Ratios to dense of everything but dense itself, the faster of several layouts."""
    best: dict[tuple, Point] = {}
    for r in rows:
        if r["impl"] == "dense" or not r["ratio_to_dense"]:
            continue
        case = (int(r["m"]), int(r["k"]), int(r["n"]), r["pattern"])
        ratio, sparsity = float(r["ratio_to_dense"]), float(r["sparsity"])
        point = Point((r["dtype"], r["direction"]), column(r), r["impl"], sparsity, ratio, case)
        key = point._replace(ratio=0.0)
        if ratio > 0 and (key not in best or best[key].ratio < ratio):
            best[key] = point
    return list(best.values())


def _pattern_points(rows: list[dict[str, str]]) -> list[Point]:
    """CSB's times on other patterns over its time on the uniform one of the same shape, sparsity, n and layout."""
    same = ("m", "k", "n", "dtype", "layout", "sparsity", "direction")
    times = {(r["pattern"], *(r[name] for name in same)): float(r["us"]) for r in rows if r["impl"] == "csb"}
    points = []
    for (pattern, *rest), us in times.items():
        m, k, n, dtype, layout, sparsity, direction = rest
        base = times.get(("uniform", *rest))
        if pattern != "uniform" and base and us:
            case = (int(m), int(k), int(n), layout)
            points.append(Point((dtype, direction), int(n), pattern, float(sparsity), us / base, case))
    return points


def _title(name: str, rows: list[dict[str, str]]) -> str:
    last = max(rows, key=lambda row: row["date"])
    others = len({row["commit"] for row in rows}) - 1
    commit = (last["commit"] or "unknown") + (f" and {others} older" if others else "")
    return f"{name}: {last['device']}, torch {last['torch']}, commit {commit}"


def _beside(picture: Path, what: str) -> Path:
    return picture.with_name(f"{picture.stem}-{what}{picture.suffix}")


def _x(sparsity: float) -> float:
    """Each halving of the nonzeros is one step, so that 90 ... 99 % have room."""
    return -math.log2(max(1 - sparsity, 1e-4))


def _figure(
    points: list[Point], picture: Path, title: str, label: str, styles: dict, head: Callable[[Any], str]
) -> bool:
    known = {**{d: i for i, d in enumerate(DTYPES)}, **{d: i for i, d in enumerate(DIRECTIONS)}}
    rows = sorted({p.row for p in points}, key=lambda row: [known.get(name, 9) for name in row])
    columns = sorted({p.column for p in points})
    style = _styles({p.line for p in points}, styles)
    sparsities = sorted({p.sparsity for p in points})
    slower = label == SLOWER

    figure = pictures.new_figure(1.2 + 2.7 * max(len(columns), 2), 1.3 + 2.2 * len(rows))
    if figure is None:
        return False
    from matplotlib.lines import Line2D

    figure.suptitle(title, fontsize=10, wrap=True)
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    panels: dict[tuple, list[Point]] = defaultdict(list)
    for p in points:
        panels[p.row, p.column].append(p)
    ratios = [p.ratio for p in points]
    # A library that loses a hundredfold would leave no room for the rest.
    low = max(min(1.0, *ratios), min([1 / 16, *(p.ratio for p in points if p.line == "csb")]))
    cut = "" if low <= min(ratios) else f", cut at 1/{1.25 / low:.0f}"
    low, high = low / 1.25, max(1.0, *ratios) * 1.25
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            ax = axes[i][j]
            _panel(ax, panels[row, column], style, sparsities)
            ax.set_yscale("log", base=2)
            ax.set_ylim(low, high)
            ax.axhspan(*((1, high) if slower else (low, 1)), color="#B22222", alpha=0.08)  # where it loses
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
            if i == 0:
                ax.set_title(head(column), fontsize=10)
            if j == 0:
                ax.set_ylabel(f"{row[0]} {row[1]}", fontsize=10)
            if i == len(rows) - 1:
                ax.set_xlabel("sparsity, %", fontsize=9)
    figure.supylabel(label + cut, fontsize=10)
    entries = [Line2D([], [], color=c, marker=mark, lw=_width(name), label=name) for name, (c, mark) in style.items()]
    entries.append(Line2D([], [], color="black", lw=1.2, label="uniform" if slower else "dense"))
    across = min(len(entries), 4 if len(columns) < 4 else 8)
    figure.legend(handles=entries, loc="outside lower center", ncols=across, fontsize=9)
    pictures.save(figure, picture)
    return True


def _styles(lines: set[str], known: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each line, in the order of the legend."""
    found = {line: style for line, style in known.items() if line in lines}
    return found | {line: SPARE[i % len(SPARE)] for i, line in enumerate(sorted(lines - known.keys()))}


def _width(line: str) -> float:
    return 2.6 if line == "csb" else 1.4


def _labels(sparsities: list[float]) -> list[str]:
    """In per cent; none where the one before is too near to leave room."""
    labels, last = [], -math.inf
    for s in sparsities:
        room = _x(s) - last > 0.2
        labels.append(f"{100 * s:.3g}" if room else "")
        last = _x(s) if room else last
    return labels


def _panel(ax, points: list[Point], style: dict[str, tuple[str, str]], sparsities: list[float]) -> None:
    ax.axhline(1, color="black", linewidth=1.2, zorder=2)
    # csb last, so that it lies on top
    for line in reversed(style):
        color, marker = style[line]
        by_sparsity: dict[float, list[float]] = defaultdict(list)
        for p in points:
            if p.line == line:
                by_sparsity[p.sparsity].append(p.ratio)
        if not by_sparsity:
            continue
        x = [_x(s) for s, ratios in by_sparsity.items() for _ in ratios]
        ax.scatter(
            x, [r for ratios in by_sparsity.values() for r in ratios], s=7, color=color, alpha=0.35, linewidths=0
        )
        x, means = zip(*sorted((_x(s), statistics.geometric_mean(r)) for s, r in by_sparsity.items()), strict=True)
        ax.plot(x, means, color=color, marker=marker, markersize=4, lw=_width(line))
    ax.set_xticks([_x(s) for s in sparsities], _labels(sparsities))
    ax.margins(x=0.08)
    ax.tick_params(labelsize=8)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
