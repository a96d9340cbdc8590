"""Rows of a benchmark: their CSV file, their table and the progress of the run."""

from __future__ import annotations

import csv
import datetime
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass
class Row:
    """One measurement. The field order is the CSV's; empty cells are None.

    ``gbps`` counts each operand and result once, ``tflops`` two operations an entry (for dense, an element) and column;
    ``limit_share`` is the device's shortest possible time over the time taken; ``ratio_to_dense`` is dense time over
    this time (above 1: faster than dense); ``rel_err`` is relative to float64 in the Frobenius norm.
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


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The checkout's commit, with a + where it has changes; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def provenance(device: str) -> dict[str, str]:
    """The columns of a row that say where and when."""
    today = datetime.date.today().isoformat()
    return {"date": today, "commit": commit(), "device": device_name(device), "torch": torch.__version__}


def append_csv(rows: Iterable[Row], results: Path, name: str) -> Path:
    """Appends to ``results/<device>/<name>.csv`` and returns the path."""
    rows = list(rows)
    folder = re.sub(r"[^a-z0-9]+", "-", rows[0].device.lower()).strip("-")
    path = results / folder / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in asdict(row).items()})
    return path


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _readable(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, float) and value >= 1000 else _cell(value)


def table(rows: Iterable[Row], columns: tuple[str, ...]) -> str:
    cells = [list(columns)] + [[_readable(getattr(row, column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
