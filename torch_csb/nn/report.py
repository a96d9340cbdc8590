from __future__ import annotations

import textwrap
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReportRow:
    """One layer of a model.

    Attributes:
        name: its first name in the model.
        kind: its type before.
        shape: (m, k) of its weight, or the full shape of a kernel that is no matrix.
        sparsity: share of elements outside the pattern; None where it wasn't counted.
        bytes_before, bytes_after: of its weight (with pattern and plan where it is compressed); equal when kept.
        action: ``"converted"`` or ``"kept"``.
        reason: why it was kept, as ``"kind of reason: detail"``; empty when converted.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float | None
    bytes_before: int
    bytes_after: int
    action: str
    reason: str = ""


@dataclass
class Report:
    """What :func:`torch_csb.sparsify_` or :func:`torch_csb.densify_` did to each layer; ``str()`` draws a table.

    ``notes`` are sentences on what to mind from here on; they stand under the table.
    """

    rows: list[ReportRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def converted(self) -> list[ReportRow]:
        return [row for row in self.rows if row.action == "converted"]

    @property
    def kept(self) -> list[ReportRow]:
        return [row for row in self.rows if row.action == "kept"]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "type", "shape", "sparsity", "before", "after", "", "reason")
        lines = [
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                "" if row.sparsity is None else f"{100 * row.sparsity:.1f} %",
                human_bytes(row.bytes_before),
                human_bytes(row.bytes_after),
                row.action,
                row.reason,
            )
            for row in self.rows
        ]
        total = (
            f"{len(self.converted)} of {len(self.rows)} layers converted",
            *("", "", ""),
            human_bytes(self.bytes_before),
            human_bytes(self.bytes_after),
            *("", ""),
        )
        # The sentence of the total may be wider than any name; it may run into the empty columns beside it.
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
        left = widths[0] + widths[1] + widths[2] + widths[3] + 6
        widths[0] += max(0, len(total[0]) - left)
        left = max(left, len(total[0]))
        table = [_line(line, widths) for line in (head, *lines)]
        rule = "-" * max(map(len, table))
        notes = [line for note in self.notes for line in textwrap.wrap(note, max(len(rule), 60))]
        sums = f"{total[0]:<{left}}  {total[4]:>{widths[4]}}  {total[5]:>{widths[5]}}"
        return "\n".join([table[0], rule, *table[1:], rule, sums, *notes])


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    aligned = zip("<<>>>><<", cells, widths, strict=True)
    return "  ".join(f"{cell:{side}{width}}" for side, cell, width in aligned).rstrip()


def human_bytes(count: int) -> str:
    """``1536`` as ``"1.5 KiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
