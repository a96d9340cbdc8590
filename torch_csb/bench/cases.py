"""What each regime measures: its grid, quick or full, and what the command line changes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch_csb.bench.patterns import PATTERNS, Collection

SHAPES = ((4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192))
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
QUICK_SPARSITIES = SPARSITIES[:-1]
DTYPES = ("float64", "float32", "bfloat16", "float16")
DIRECTIONS = ("F", "T", "dW")
LAYOUTS = ("last", "first")
OURS = ("csb", "dense", "dense_tf32")
PEERS = ("torch_csr", "csr_row_split", "csr_merge", "csr_row_swizzle", "csr_sddmm")


@dataclass(frozen=True)
class Grid:
    """The axes of a regime; its cases are their product. ``layouts`` are those in which CSB is measured.

    For the collection's matrices empty axes stand for what its files have.
    """

    regime: str
    device: str
    columns: tuple[int, ...]
    directions: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...] = SHAPES
    sparsities: tuple[float, ...] = QUICK_SPARSITIES
    patterns: tuple[str, ...] = ("uniform",)
    layouts: tuple[str, ...] = ("last",)
    implementations: tuple[str, ...] = OURS

    def full(self) -> Grid:
        """The grid with every sparsity, pattern, layout, 16-bit dtype and peer."""
        dtypes = (*self.dtypes, "float16") if "bfloat16" in self.dtypes else self.dtypes
        return replace(
            self,
            dtypes=dtypes,
            sparsities=SPARSITIES if self.sparsities else (),
            patterns=tuple(PATTERNS) if self.patterns else (),
            layouts=LAYOUTS,
            implementations=(*OURS, *PEERS),
        )


REGIMES = {
    grid.regime: grid
    for grid in (
        Grid("decode", "cuda", (1, 8, 16, 32, 64), ("F", "T"), ("bfloat16",)),
        Grid("train", "cuda", (1024, 4096), ("F", "T", "dW"), ("bfloat16",)),
        Grid("fp32", "cuda", (1, 8, 64, 256, 4096), ("F", "T"), ("float32",)),
        Grid("sddmm", "cuda", (64, 512, 4096), ("dW",), ("float32", "bfloat16")),
        Grid("dlmc", "cuda", (), ("F", "T", "dW"), ("float32", "bfloat16"), (), (), (), ("first",)),
        Grid("cpu", "cpu", (1, 16, 64, 256), ("F", "T", "dW"), ("float32",)),
    )
}


@dataclass(frozen=True)
class Weights:
    """One weight matrix. Its cases are measured together, because packing it takes longer than they do."""

    m: int
    k: int
    dtype: str
    pattern: str
    sparsity: float


@dataclass(frozen=True)
class Case:
    """One product on a weight. ``implementations`` are those wanted of it, ``layouts`` those of CSB."""

    regime: str
    weights: Weights
    n: int
    direction: str
    layouts: tuple[str, ...]
    implementations: tuple[str, ...]

    def key(self) -> tuple[str, ...]:
        """What a CSV's row says of its case."""
        w = self.weights
        return tuple(map(str, (w.m, w.k, self.n, w.dtype, w.pattern, w.sparsity, self.direction)))

    def __str__(self) -> str:
        w = self.weights
        return f"{w.m} x {w.k}, {w.pattern}, {w.sparsity:.0%}, {w.dtype}, n = {self.n}, {self.direction}"


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("m", "k", "n", "dtype", "pattern", "sparsity", "direction"))


def weights_of(grid: Grid, collection: Collection | None) -> Iterator[Weights]:
    """Sparsities run innermost, so that a run that is cut short has whole shapes."""
    if grid.regime == "dlmc":
        assert collection is not None
        for path in collection.files:
            pattern = collection.pattern(path)
            sparsity, shape = collection.sparsity(pattern), collection.shape(pattern)
            if grid.patterns and pattern not in grid.patterns:
                continue
            if (grid.sparsities and sparsity not in grid.sparsities) or (grid.shapes and shape not in grid.shapes):
                continue
            for dtype in grid.dtypes:
                yield Weights(*shape, dtype, pattern, sparsity)
        return
    for pattern in grid.patterns:
        for dtype in grid.dtypes:
            for m, k in grid.shapes:
                for sparsity in grid.sparsities:
                    yield Weights(m, k, dtype, pattern, sparsity)


def cases_of(grid: Grid, weights: Weights, collection: Collection | None = None) -> list[Case]:
    """Peers run on uniform patterns and on real ones."""
    columns: Sequence[int] = grid.columns
    if weights.pattern.startswith("dlmc:") and not columns:
        assert collection is not None
        columns = collection.columns(weights.pattern)
    with_peers = weights.pattern == "uniform" or weights.pattern.startswith("dlmc:")
    wanted = tuple(name for name in grid.implementations if name in OURS or with_peers)
    return [
        Case(grid.regime, weights, n, direction, grid.layouts, wanted) for n in columns for direction in grid.directions
    ]
