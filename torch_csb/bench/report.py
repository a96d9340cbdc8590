"""Rows of a benchmark: their CSV file, their table, and where and when they were taken."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch


@dataclass
class Row:
    """One measurement. The field order is the CSV's; empty cells are None.

    ``gbps`` counts each operand and result once, ``tflops`` two operations an entry (for dense, an element) and column;
    ``limit_share`` is the device's shortest possible time over the time taken; ``ratio_to_dense`` is dense time over
    this time (above 1: faster than dense) from the same run; ``rel_err`` is relative to float64 in the Frobenius norm.
    """

    date: str
    commit: str
    device: str
    torch: str
    regime: str
    m: int
    k: int
    n: int
    dtype: str
    pattern: str
    layout: str
    sparsity: float
    direction: str
    impl: str
    us: float
    us_spread: float
    gbps: float | None = None
    tflops: float | None = None
    limit_share: float | None = None
    ratio_to_dense: float | None = None
    rel_err: float | None = None


class Provenance(NamedTuple):
    """Where rows come from. ``stamp()`` gives the first columns of every CSV, with the time of now."""

    commit: str
    device: str
    torch: str

    @classmethod
    def of(cls, device: str, commit: str | None = None) -> Provenance:
        return cls(commit if commit is not None else checkout_commit(), device_name(device), torch.__version__)

    def stamp(self) -> dict[str, str]:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return {"date": now, **self._asdict()}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def checkout_commit() -> str:
    """The checkout's commit, with a + where it has changes; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def csv_path(results: Path, device_name: str, name: str) -> Path:
    """``results/<device>/<name>.csv``"""
    return results / re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") / f"{name}.csv"


def append_csv(rows: Sequence[Any], path: Path) -> None:
    """Appends dataclass instances. A file with other columns is refused rather than mixed."""
    names = [field.name for field in fields(rows[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != names:
            raise ValueError(
                f"{path} has other columns than this version writes: move it away or give another --results folder"
            )
        new = False
    else:
        new = True
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: cell(value) for key, value in asdict(row).items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_regime(path: Path) -> bool:
    """Whether a file holds Row's columns."""
    with path.open() as file:
        return file.readline().strip().split(",") == [field.name for field in fields(Row)]


def newest(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The last row of every case by date, and by place in the file where dates are the same.

    CSB has a row for each layout; of the others the faster layout was written, which need not be the same every time.
    """
    case = ("m", "k", "n", "dtype", "pattern", "sparsity", "direction", "impl")
    found: dict[tuple, dict[str, str]] = {}
    for row in rows:
        key = (*(row[name] for name in case), row["layout"] if row["impl"] == "csb" else "")
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def from_cells(cells: dict[str, str]) -> Row:
    """A row of a CSV with its numbers as numbers."""
    kinds = {field.name: str(field.type).split(" ")[0] for field in fields(Row)}
    convert = {"str": str, "int": int, "float": float}
    return Row(**{name: convert[kinds[name]](text) if text else None for name, text in cells.items()})


def cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _readable(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, float) and value >= 1000 else cell(value)


def table(rows: Iterable[Any], columns: Sequence[str]) -> str:
    cells = [list(columns)] + [[_readable(getattr(row, column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)
