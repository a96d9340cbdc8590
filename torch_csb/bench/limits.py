"""What a device allows: the shortest time for a product is the longer of its bytes at full bandwidth and its operations
at full rate. Both are measured at the start of a run, with the same clock as the cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from torch_csb.bench.implementations import tf32
from torch_csb.bench.report import Provenance, append_csv, csv_path
from torch_csb.bench.timing import time_all

# Elements of the tensor that is read, and sizes of the products: the best of them counts.
LARGE = {"cpu": (1 << 27, (2048,)), "cuda": (1 << 30, (4096, 8192))}


@dataclass
class Ceiling:
    """A line of ceilings.csv: ``quantity`` is "read" (GB/s) or "gemm <dtype>" (TFLOP/s)."""

    date: str
    commit: str
    device: str
    torch: str
    quantity: str
    value: float
    unit: str


@dataclass(frozen=True)
class Limits:
    bytes_per_s: float  # read from main memory
    flops: dict[str, float]  # of a dense product by dtype; "tf32" too on CUDA

    def us(self, kind: str, bytes_moved: float, flops: float) -> float:
        """Shortest time in µs; ``kind`` is a dtype's name or "tf32"."""
        return 1e6 * max(bytes_moved / self.bytes_per_s, flops / self.flops[kind])

    def __str__(self) -> str:
        rates = ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in self.flops.items())
        return f"ceilings: read {self.bytes_per_s / 1e9:,.0f} GB/s, dense products {rates}"

    def append(self, provenance: Provenance, results: Path) -> None:
        """Adds them to ``results/<device>/ceilings.csv``."""
        values = {"read": (self.bytes_per_s / 1e9, "GB/s")}
        values |= {f"gemm {kind}": (rate / 1e12, "TFLOP/s") for kind, rate in self.flops.items()}
        rows = [Ceiling(**provenance.stamp(), quantity=key, value=v, unit=u) for key, (v, u) in values.items()]
        append_csv(rows, csv_path(results, provenance.device, "ceilings"))


def measure_limits(device: str, dtypes: tuple[str, ...]) -> Limits:
    """Bandwidth of a kernel that reads one large tensor, and rates of large square products of random numbers."""
    kinds = [*dtypes, "tf32"] if device == "cuda" and "float32" in dtypes else list(dtypes)
    flops = {}
    for kind in kinds:
        dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
        flops[kind] = max(_gemm_rate(device, dtype, size, kind == "tf32") for size in LARGE[device][1])
    return Limits(_read_rate(device), flops)


def _read_rate(device: str) -> float:
    """The better of a sum and of an elementwise sum of two tensors, which also writes."""
    count = LARGE[device][0]
    a = torch.ones(count, device=device)
    b, c = torch.ones(count // 4, device=device), torch.empty(count // 4, device=device)
    timings = time_all(device, {"read": [lambda: a.sum()], "add": [lambda: torch.add(b, b, out=c)]}, 0.5)
    return max(a.nbytes / timings["read"].us, 2 * b.nbytes / timings["add"].us) * 1e6


def _gemm_rate(device: str, dtype: torch.dtype, size: int, with_tf32: bool) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> torch.Tensor:
        with tf32(with_tf32):
            return a @ b

    return 2e6 * size**3 / time_all(device, {"gemm": [product]}, 0.5)["gemm"].us
