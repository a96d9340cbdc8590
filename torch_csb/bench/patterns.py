"""Where the nonzeros of a benchmark's weights stand."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

from torch_csb.testing import read_smtx

# What each is for. All of a shape and sparsity have the same expected number of nonzeros.
PATTERNS = {
    "uniform": "every element is kept with the same probability",
    "powerlaw": "row lengths fall as the power -0.8 of their rank; rows in random order",
    "full_row": "one row is full, the rest uniform",
    "full_col": "one column is full, the rest uniform",
    "half_empty": "the right half of the columns is empty as far as the sparsity allows",
}


def make_mask(
    pattern: str, m: int, k: int, sparsity: float, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensor:
    """A bool mask [m, k] with about ``(1 - sparsity) * m * k`` elements set.

    Args:
        pattern: a name of PATTERNS.
        generator: must live on ``device``.

    Raises:
        ValueError: unknown pattern.
    """
    density = torch.full((m, k), 1.0 - sparsity, device=device)
    wanted = (1.0 - sparsity) * m * k
    if pattern == "powerlaw":
        rank = torch.arange(1, m + 1, device=device, dtype=torch.float64)
        rows = _clipped(rank**-0.8, wanted / k)[torch.randperm(m, device=device, generator=generator)]
        density = rows.float()[:, None]
    elif pattern == "full_row":
        density.fill_(max(wanted - k, 0.0) / max((m - 1) * k, 1))
        density[m // 2] = 1.0
    elif pattern == "full_col":
        density.fill_(max(wanted - m, 0.0) / max(m * (k - 1), 1))
        density[:, k // 2] = 1.0
    elif pattern == "half_empty":
        left = k // 2
        share = min(wanted / max(m * left, 1), 1.0)
        density[:, :left] = share
        density[:, left:] = (wanted - share * m * left) / max(m * (k - left), 1)
    elif pattern != "uniform":
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")
    return torch.rand(m, k, device=device, generator=generator) < density


def _clipped(weights: Tensor, total: float) -> Tensor:
    """``weights`` scaled to sum to ``total`` with no element above 1."""
    scale = total / weights.sum()
    for _ in range(50):
        clipped = (weights * scale).clamp_max(1.0)
        free = weights[clipped < 1.0].sum()
        missing = total - clipped.sum()
        if missing <= 1e-6 * total or free == 0:
            break
        scale = scale + missing / free
    return clipped


class Collection:
    """A folder of the Deep Learning Matrix Collection: model/method/sparsity/name.smtx(.gz), rn50_batchsizes.txt.

    Raises ``ValueError`` where the folder holds no such file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("*/*/*/*.smtx*"))
        if not self.files:
            raise ValueError(f"--dlmc: expected model/method/sparsity/name.smtx[.gz] below it, found none in {folder}")
        sizes = folder / "rn50_batchsizes.txt"
        self._columns = {}
        if sizes.is_file():
            lines = (line.split(",") for line in sizes.read_text().splitlines() if line.strip())
            self._columns = {name.strip(): int(columns) for name, columns in lines}

    def pattern(self, path: Path) -> str:
        """``dlmc:model/method/sparsity/name``"""
        name = path.relative_to(self.folder).as_posix()
        return "dlmc:" + name.removesuffix(".gz").removesuffix(".smtx")

    def path(self, pattern: str) -> Path:
        name = pattern.removeprefix("dlmc:")
        for suffix in (".smtx.gz", ".smtx"):
            if (path := self.folder / (name + suffix)).is_file():
                return path
        raise ValueError(f"--dlmc: {self.folder} has no {name}.smtx or .smtx.gz")

    def shape(self, pattern: str) -> tuple[int, int]:
        path = self.path(pattern)
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            m, k, _ = (int(number) for number in file.readline().split(","))
        return m, k

    def sparsity(self, pattern: str) -> float:
        return float(pattern.split("/")[2])

    def columns(self, pattern: str) -> tuple[int, ...]:
        """n of the layer: 256 tokens of a transformer; a ResNet-50 layer's own pixels for a batch of 1 and of 64."""
        model, *_, name = pattern.removeprefix("dlmc:").split("/")
        if model != "rn50":
            return (256,)
        if name not in self._columns:
            raise ValueError(f"{self.folder / 'rn50_batchsizes.txt'} has no line for {name}")
        return (self._columns[name], 64 * self._columns[name])

    def mask(self, pattern: str, device: torch.device | str) -> Tensor:
        return read_smtx(self.path(pattern)).to(device)
