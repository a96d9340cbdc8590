"""Small cases of every CUDA kernel: `compute-sanitizer --tool memcheck python tests/sanitizer_cases.py`.

Results are checked too: a kernel that reads nothing can't read out of bounds. They are judged on the CPU, because
torch's own kernels, cuBLAS above all, take minutes under the sanitizer. Without a GPU the script exits with an error.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baseline_cases import check_all as check_baselines
from cases import DTYPES, activation, build, random_matrix
from cases import check_all as check_all_anywhere

from torch_csb import CSBMatrix, explain, ops
from torch_csb.testing import MATRICES, compare, expect_sddmm, matrix

check_all = partial(check_all_anywhere, judge="cpu")
COLUMNS = (1, 8, 33, 130)
DENSITIES = (0.0, 0.5, 0.1, 0.001, 1.0)
# Edge shapes, and shapes that would cost the sanitizer minutes, left out.
SMALL = [case for case in MATRICES if case.m * case.k <= 70_000]


def products(device: str, dtype: torch.dtype) -> None:
    for density in DENSITIES:
        w = random_matrix(130, 200, 1 - density, dtype, device, 64)
        for n in COLUMNS:
            check_all(w, "rows", n)
            check_all(w, "nchw", n, bias=True, act="relu")


def split_products(device: str, dtype: torch.dtype) -> None:
    """Entries for several units in one strip: partial sums and their join."""
    for m, k in ((70, 1000), (1000, 70)):
        w = random_matrix(m, k, 0.5, dtype, device, 64)
        assert w.units.shape[1] > 2, "one unit: nothing is split"
        for n in COLUMNS:
            check_all(w, "rows", n, bias=True, act="gelu")


def clusters(device: str, dtype: torch.dtype) -> None:
    """Even strips, which thread blocks of a cluster share; one of them has no block left, and some blocks no entry."""
    for m, k, sparsity in ((128, 576, 0.5), (576, 128, 0.97)):
        w = random_matrix(m, k, sparsity, dtype, device, 64)
        assert w.units.shape[1] % 2 == 1, "uneven strips: nothing is shared"
        for n in (1, 8, 13, 70):
            check_all(w, "rows", n, bias=True, act="relu")


def row_clusters(device: str) -> None:
    """float32 from 17 columns on: four blocks each, more steps than a ring has stages, in every way of reading X."""
    for m, k in ((64, 2048), (2048, 64)):
        w = random_matrix(m, k, 0.5, device=device)
        assert w.units.shape[1] % 2 == 1, "uneven strips: nothing is shared"
        for layout, n in (("rows", 72), ("columns", 72), ("feature_gaps", 33), ("row_gaps", 33)):
            check_all(w, layout, n, bias=True, act="relu")


def regions(device: str) -> None:
    """Runs of more columns than a ring holds: its stages are used again."""
    n = 1300
    w = random_matrix(512, 1028, 0.97, device=device)
    assert n >= 5 * 16 * explain(w, n).steps[2].split, "short runs: no stage is used again"
    for layout in ("rows", "columns", "row_gaps", "feature_gaps"):
        a, dim = activation(layout, w.m, n, w.dtype, device)
        b, _ = activation(layout, w.k, n, w.dtype, device)
        expected = expect_sddmm(w.to("cpu"), a.cpu(), b.cpu(), dim)
        compare(ops.sddmm(w, a, b, dim=dim).cpu(), expected, f"{w}, {layout}")


def bitmaps(device: str) -> None:
    """Every reader of a bitmap: few columns whole and split, codes made of it, a panel and its sample."""
    for dtype in DTYPES:
        for density in DENSITIES:
            w = random_matrix(130, 200, 1 - density, dtype, device, "bitmap")
            for n in (1, 8, 13, 33):
                check_all(w, "rows", n, bias=True, act="relu")
    for dtype in (torch.bfloat16, torch.float16):
        for m, k in ((70, 4104), (4104, 70)):  # more blocks than a ring has room for
            w = random_matrix(m, k, 0.4, dtype, device, "bitmap")
            assert w.units.shape[1] > 2, "one unit: nothing is split"
            for n in (8, 16):
                check_all(w, "rows", n)
    w = random_matrix(500, 1030, 0.5, torch.float32, device, "bitmap")
    assert device == "cpu" or {step.kernel for step in explain(w, 256).steps} == {"panel"}
    check_all(w, "rows", 256)


def block_sizes(device: str, dtype: torch.dtype) -> None:
    for block_size in (2, 16, 32, 128, 256):
        for n in (1, 33):
            check_all(build(matrix("edge_65x63"), dtype, device, block_size), "columns", n)


def edges(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for case in SMALL:
            for n in (0, 1, 9):
                check_all(build(case, dtype, device, 64), "row_gaps", n, bias=True, act="silu")


def layouts(device: str) -> None:
    w = {dtype: build(matrix("edge_65x63"), dtype, device, 64) for dtype in DTYPES}
    for dtype in DTYPES:
        for layout in ("misaligned", "feature_gaps", "nchw_strided", "channels_last", "three_levels", "same_row"):
            for n in (1, 24, 130):
                check_all(w[dtype], layout, n)


def conversions(device: str) -> None:
    for dtype in DTYPES:
        for case in SMALL:
            for block_size in (16, 64, 256):
                w = build(case, dtype, device, block_size)
                assert torch.equal(w.to_dense().cpu(), case.dense(dtype)), case
        weight, _ = activation("feature_gaps", 130, 70, dtype, device)
        mask = torch.rand(130, 70, device=device).t() < 0.3
        w = CSBMatrix.from_dense(weight, mask)
        assert torch.equal(w.to_dense(), torch.where(mask, weight, 0)), dtype


def baselines(device: str) -> None:
    """The CSR kernels: odd sizes, aligned and misaligned arrays, and a row that holds most of the entries."""
    for dtype in DTYPES:
        for density in (0.0, 0.1, 1.0):
            w = random_matrix(67, 131, 1 - density, dtype, device, 64)
            for n in COLUMNS:
                check_baselines(w, n, misaligned=n % 2 == 1, judge="cpu")
        check_baselines(w, 8, misaligned=True, judge="cpu")
        weight = torch.zeros(70, 1500)
        weight[::7, ::50] = 1
        weight[33] = torch.randn(1500)
        w = CSBMatrix.from_dense(weight.to(device=device, dtype=dtype))
        for n in COLUMNS:
            check_baselines(w, n, judge="cpu")
        for case in ("0x70", "70x0", "1x1", "one_row", "one_column", "empty"):
            for n in (0, 9):
                check_baselines(build(matrix(case), dtype, device), n, judge="cpu")


# The longest are cut by dtype, since parts run side by side.
PARTS = {
    f"{part.__name__}_{str(dtype).removeprefix('torch.')}": partial(part, dtype=dtype)
    for part in (products, split_products, clusters, block_sizes)
    for dtype in DTYPES
} | {
    part.__name__: part for part in (row_clusters, regions, bitmaps, edges, layouts, conversions, baselines)
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu runs the same cases without a GPU")
    parser.add_argument("--list", action="store_true", help="print the parts' names")
    parser.add_argument("--only", choices=PARTS, action="append")
    options = parser.parse_args()
    if options.list:
        print(*PARTS)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    for name, part in PARTS.items():
        if not options.only or name in options.only:
            part(options.device)
            print(f"{name}: right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
