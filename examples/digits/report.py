"""One table and one picture of the same numbers."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from .measure import Bytes, Latency


@dataclass(frozen=True)
class Results:
    """`accuracy` maps a stage to one percentage per seed; `held` maps a form of the model to its bytes."""

    machine: str
    accuracy: dict[str, list[float]]
    held: dict[str, Bytes]
    latency: list[Latency]


def mean_std(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: Results) -> str:
    """The three blocks of the table share their columns: masked dense, CSR, CSB."""
    width = 40
    rule = "─" * (width + 4 * 14 + 16)

    def line(name: str, *cells: str) -> str:
        return name.ljust(width) + "".join(cell.rjust(14) for cell in cells)

    out = [rule, line("", "dense", "masked dense", "torch CSR", "CSB"), rule]
    accuracy = [mean_std(results.accuracy[stage]) for stage in ("dense", "masked dense", "CSB")]
    seeds = len(results.accuracy["dense"])
    spread = seeds > 1
    dense, masked, csb = (f"{mean:.2f}" + f" ± {std:.2f}" * spread for mean, std in accuracy)
    out.append(
        line(f"accuracy, % ({seeds} seeds, mean ± std)" if spread else "accuracy, % (1 seed)", dense, masked, "-", csb)
    )
    out.append(line("", "trained", "90 % pruned", "", "fine-tuned"))
    for part in ("weights", "gradients", "optimizer", "total"):
        cells = [f"{getattr(results.held[form], part) / 1024:,.0f}" for form in ("dense", "masked dense", "CSB")]
        name = {"weights": "weights, masks, indices", "optimizer": "optimizer state"}.get(part, part)
        out.append(line(f"{name}, KiB", cells[0], cells[1], "-", cells[2]))
    out.append(rule)
    out.append(line("latency, µs", "", "", "", "") + "  CSB vs masked")
    for row in results.latency:
        csr = "-" if row.csr is None else f"{row.csr:,.0f}"
        out.append(line(row.case, "-", f"{row.masked_dense:,.0f}", csr, f"{row.csb:,.0f}") + "  " + _ratio(row))
    return "\n".join([*out, rule, results.machine])


def _ratio(row: Latency) -> str:
    ratio = row.masked_dense / row.csb
    if 0.995 < ratio < 1.005:
        return "equal"
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


COLOURS = {"dense": "#9aa5b1", "masked dense": "#52606d", "torch CSR": "#d9a441", "CSB": "#2b7a9b"}


def picture(results: Results, path: Path) -> None:
    """Draw accuracy, memory and latency side by side; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplot_mosaic(
        [["accuracy", "memory"], ["latency", "latency"]], width_ratios=[1, 1.7], height_ratios=[1, 1.2]
    )
    _draw_accuracy(axes["accuracy"], results)
    _draw_memory(axes["memory"], results)
    _draw_latency(axes["latency"], results)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, COLOURS, loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.suptitle(f"Digits: 1x1 convolutions and hidden Linear layer pruned by 90 %\n{results.machine}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_accuracy(ax, results: Results) -> None:
    seeds = len(results.accuracy["dense"])
    labels = {"dense": "dense", "masked dense": "pruned\n(masked)", "CSB": "fine-tuned\n(CSB)"}
    for at, stage in enumerate(labels):
        mean, std = mean_std(results.accuracy[stage])
        ax.bar(at, mean, yerr=std, capsize=4, width=0.7, color=COLOURS[stage])
        text = f"{mean:.2f}\n± {std:.2f}" if seeds > 1 else f"{mean:.2f}"
        colour = "black" if stage == "dense" else "white"
        below = {"xytext": (0, -6), "textcoords": "offset points", "ha": "center", "va": "top"}
        ax.annotate(text, (at, mean - std), color=colour, **below)
    lowest = min(min(values) for values in results.accuracy.values())
    ax.set_ylim(max(0.0, 5 * ((lowest - 3) // 5)), 100.5)
    ax.set_xticks(range(len(labels)), labels.values())
    ax.set_ylabel("correct on the held-out quarter, %\n(axis does not start at 0)")
    ax.set_title(f"Accuracy ({seeds} seeds, mean ± std)" if seeds > 1 else "Accuracy (1 seed)")


def _draw_memory(ax, results: Results) -> None:
    parts = {"weights": "weights, masks,\nindices", "gradients": "gradients", "optimizer": "optimizer state\n(AdamW)"}
    for offset, form in enumerate(results.held):
        sizes = [getattr(results.held[form], part) / 1024 for part in parts]
        bars = ax.bar([at + 0.29 * (offset - 1) for at in range(len(parts))], sizes, 0.27, color=COLOURS[form])
        ax.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=2)
    ax.set_xticks(range(len(parts)), parts.values())
    ax.set_ylabel("KiB")
    ax.set_title("Memory of the whole net in training")


def _draw_latency(ax, results: Results) -> None:
    forms = {"masked dense": "masked_dense", "torch CSR": "csr", "CSB": "csb"}
    times = []
    for at, row in enumerate(results.latency):
        for offset, (form, field) in enumerate(forms.items()):
            time = getattr(row, field)
            if time is None:
                continue
            bar = ax.barh(at + 0.28 * (offset - 1), time, 0.26, color=COLOURS[form])
            ax.bar_label(bar, labels=[f"{time:,.0f}"], fontsize=8, padding=2)
            times.append(time)
    ax.set_yticks(range(len(results.latency)), [row.case for row in results.latency])
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlim(min(times) / 3, 2 * max(times))
    ax.set_xlabel("µs, logarithmic")
    ax.set_title("Latency, median (less is better)")
