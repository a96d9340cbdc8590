"""The rows of `bench prune` as tables and as a picture: mean ± standard deviation over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from torch_csb.bench import pictures
from torch_csb.bench.pruning import BITS, CONTROLS, NAMES, SCRATCH, SHARED
from torch_csb.bench.report import table

Rows = Sequence[dict[str, str]]
# A method and its control: of the random ones that with the same schedule.
PAIRS = (("magnitude", "random"), ("magnitude-one-shot", "random-one-shot"), ("magnitude", SCRATCH))
# Of the picture's scale, in percent.
WRONG, LEAST_WRONG = (1, 2, 5, 10, 20, 50, 80), 0.4
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "navy", "C9")
MARKERS = "osD^vP<>X*hpd"


def mean_std(rows: Rows, column: str) -> tuple[float, float]:
    """Over the rows; of a single one the deviation is 0."""
    values = [float(row[column]) for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def grouped(rows: Rows) -> dict[tuple[str, float], Rows]:
    """By method and sparsity, in the order of NAMES."""
    found: dict[tuple[str, float], list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: (NAMES.index(row["method"]), float(row["sparsity"]))):
        found.setdefault((row["method"], float(row["sparsity"])), []).append(row)
    return found


def print_tables(rows: Rows) -> None:
    """Every method at every sparsity, then what magnitude is worth beside chance, then bytes."""
    groups, lines = grouped(rows), []
    for (method, sparsity), group in groups.items():
        line = {"method": method, "sparsity": f"{100 * sparsity:g} %", "seeds": str(len(group))}
        line |= {stage: _plus_minus(group, f"accuracy_{stage}") for stage in ("dense", "pruned", "csb")}
        line["zeros"] = _plus_minus(group, "achieved_sparsity", 100)
        line["s"] = f"{mean_std(group, 'seconds')[0]:.1f}"
        lines.append(SimpleNamespace(**line))
    print("\nheld-out digits classified right, and zeros in the pruned layers; percent, mean ± standard deviation")
    print(table(lines, tuple(vars(lines[0]))))
    for sparsity in sorted({sparsity for _, sparsity in groups}):
        for pair in PAIRS:
            found = [groups[method, sparsity] for method in pair if (method, sparsity) in groups]
            if len(found) == 2:
                print(verdict(*found))
    _print_bytes({sparsity: group for (method, sparsity), group in groups.items() if method == SHARED})


def verdict(method: Rows, control: Rows) -> str:
    """Whether a method beats its control by more than both deviations together, after fine-tuning as CSB."""
    (high, a), (low, b) = mean_std(method, "accuracy_csb"), mean_std(control, "accuracy_csb")
    name, other = method[0]["method"], control[0]["method"]
    said = f"{100 * float(method[0]['sparsity']):g} %: {name} {high - low:+.2f} points over {other}, "
    if min(len(method), len(control)) < 2:
        return said + "one seed, so no error bars"
    return said + ("outside" if high - a > low + b else "NOT outside") + " the error bars"


def _print_bytes(shared: dict[float, Rows]) -> None:
    if not shared:
        return
    lines = []
    for sparsity, group in shared.items():
        sizes = {name: f"{mean_std(group, f'bytes_{name}')[0]:,.0f}" for name in ("dense", "csb", "codes", "file")}
        lost = [float(row["accuracy_pruned"]) - float(row["accuracy_csb"]) for row in group]
        times = mean_std(group, "bytes_dense")[0] / mean_std(group, "bytes_file")[0]
        line = {"sparsity": f"{100 * sparsity:g} %", **sizes, "dense/file": f"{times:.1f}"}
        lines.append(SimpleNamespace(**line, lost=f"{statistics.fmean(lost):+.2f}", worst=f"{max(lost):+.2f}"))
    print(f"\nbytes of the whole net, and points of accuracy lost at {BITS} bits, on average and at worst")
    print(table(lines, tuple(vars(lines[0]))))


def _plus_minus(rows: Rows, column: str, factor: float = 1.0) -> str:
    mean, std = mean_std(rows, column)
    return f"{factor * mean:.2f}" + (f" ± {factor * std:.2f}" if len(rows) > 1 else "")


def draw(rows: Rows, target: Path) -> None:
    """Accuracy over sparsity, after pruning and after fine-tuning as CSB; controls dashed."""
    figure = pictures.new_figure(14, 6.5)
    if figure is None:
        return
    groups = grouped(rows)
    sparsities = sorted({sparsity for _, sparsity in groups})
    methods = list(dict.fromkeys(method for method, _ in groups))
    styles = _styles()
    axes = figure.subplots(1, 2, sharey=True)
    for axis, stage, title in zip(axes, ("pruned", "csb"), ("pruned", "converted and fine-tuned as CSB"), strict=True):
        for i, method in enumerate(methods):
            if stage == "pruned" and method == SHARED:
                continue
            points = [(at, groups[method, s]) for at, s in enumerate(sparsities) if (method, s) in groups]
            # Side by side, so that error bars don't hide each other.
            places = [at + 0.7 * ((i + 0.5) / len(methods) - 0.5) for at, _ in points]
            means, stds = zip(*(mean_std(group, f"accuracy_{stage}") for _, group in points), strict=True)
            wrong = [max(100 - mean, LEAST_WRONG) for mean in means]
            axis.errorbar(places, wrong, stds, label=method, ms=5, capsize=2, lw=1, **styles[method])
        axis.axhline(max(100 - mean_std(rows, "accuracy_dense")[0], LEAST_WRONG), color="black", linewidth=0.8)
        axis.set_xticks(range(len(sparsities)), [f"{100 * sparsity:g} %" for sparsity in sparsities])
        axis.set(title=f"{title} (line: dense)", xlabel="zeros in the pruned layers")
        axis.grid(axis="y", alpha=0.3)
    # Evenly in the logarithm of what is wrong: most methods are told apart between 95 and 99 %.
    axes[0].set_yscale("log", nonpositive="clip")
    axes[0].set_yticks(WRONG, [str(100 - wrong) for wrong in WRONG])
    axes[0].minorticks_off()
    axes[0].set_ylim(95, LEAST_WRONG)
    axes[0].set_ylabel("held-out digits classified right, %")
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    what = ", ".join(f"{name} {rows[0][name]}" for name in ("epochs", "torch", "commit"))
    figure.suptitle(f"Digits, mean ± std of {len({row['seed'] for row in rows})} seeds, {what}")
    pictures.save(figure, target)


def _styles() -> dict[str, dict[str, str]]:
    """Grey and dashed for a control, a colour for each other method."""
    others = [name for name in NAMES if name not in CONTROLS]
    styles = {name: {"color": colour, "ls": "-"} for name, colour in zip(others, COLOURS, strict=True)}
    greys = zip(CONTROLS, ("dimgray", "darkgray", "black"), strict=True)
    styles |= {name: {"color": grey, "ls": "--"} for name, grey in greys}
    return {name: {**styles[name], "marker": mark} for name, mark in zip(NAMES, MARKERS, strict=True)}
