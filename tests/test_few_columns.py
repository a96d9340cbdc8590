"""The kernels for few columns: every count, strips joined by a cluster or by a second kernel, and the planner."""

from __future__ import annotations

import pytest
import torch
from cases import check_all, random_matrix
from torch import Tensor

from torch_csb import CSBMatrix

_plan = pytest.importorskip("torch_csb._plan")
SMS = 132


def skewed(m: int, k: int, dtype: torch.dtype, device: str) -> CSBMatrix:
    """Nonzeros that thin out from the first row on, and from the first column on."""
    density = torch.linspace(1, 0, m)[:, None] ** 3 * torch.linspace(1, 0, k) ** 3
    weight = torch.randn(m, k) * (torch.rand(m, k) < density)
    return CSBMatrix.from_dense(weight.to(device=device, dtype=dtype), block_size=64)


def num_units(w: CSBMatrix) -> int:
    return w.units.shape[1] - 1


def choose(w: CSBMatrix, n: int, *, dtype: str = "bfloat16", **given: object) -> _plan.Choice:
    strips = -(-w.m // w.block_size)
    return _plan.choose_cuda_spmm(dtype, w.block_size, strips, num_units(w), n, SMS, **given)


def test_even_strips_have_an_even_number_of_units() -> None:
    assert num_units(random_matrix(1024, 2048, 0.9)) % 2 == 0
    w = skewed(1024, 2048, torch.float32, "cpu")
    assert num_units(w) % 2 == 1 and num_units(w) > 1
    rows = torch.zeros(1024, 2048)
    rows[5] = 1
    assert num_units(CSBMatrix.from_dense(rows, block_size=64)) % 2 == 1
    assert num_units(CSBMatrix.from_dense(rows.t(), block_size=64)) % 2 == 1


def test_even_strips_are_shared_by_clusters_and_others_are_cut() -> None:
    even, uneven = random_matrix(1024, 2048, 0.9), skewed(1024, 2048, torch.float32, "cpu")
    for n, kernel in ((1, "spmv"), (2, "narrow"), (8, "narrow"), (16, "narrow")):
        choice = choose(even, n)
        assert (choice.kernel, choice.split) == (kernel, False) and 2 <= choice.cluster <= 8
        others = choose(uneven, n), choose(even, n, hopper=False), choose(even, n, blocks_per_strip=4096)
        for choice in others:
            assert (choice.kernel, choice.split, choice.cluster) == (kernel, True, 1)
    assert choose(even, 1, dtype="float32").kernel == "spmv"
    assert choose(even, 2, dtype="float32").kernel == "gather"


def test_what_cannot_be_read_in_pieces_and_more_columns_go_elsewhere() -> None:
    w = random_matrix(1024, 2048, 0.9)
    assert choose(w, 1, pieces=False).kernel == "tile"
    assert choose(w, 1, pieces=False, dtype="float32").kernel == "gather"
    assert choose(w, 8, pieces=False).kernel == "tile"
    assert choose(w, 17).kernel != "narrow"


@pytest.mark.parametrize("n", [*range(1, 18), *range(24, 131, 8), *range(31, 131, 16), 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_count(dtype: torch.dtype, n: int, device: str) -> None:
    check_all(random_matrix(200, 328, 0.8, dtype, device), "rows", n, bias=True, act="silu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 5, 8, 11, 16])
@pytest.mark.parametrize("make", [lambda *a: random_matrix(*a[:2], 0.9, *a[2:]), skewed], ids=["even", "skewed"])
@pytest.mark.parametrize(("m", "k"), [(1024, 2048), (2048, 1024), (1000, 4104), (64, 8192), (8192, 64)])
def test_clusters_and_units(make: object, m: int, k: int, n: int, dtype: torch.dtype) -> None:
    w = make(m, k, dtype, "cuda")
    check_all(w, "rows", n, bias=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("n", [1, 8, 16])
@pytest.mark.parametrize("make", [lambda *a: random_matrix(*a[:2], 0.9, *a[2:]), skewed], ids=["even", "skewed"])
def test_two_streams_and_a_hundred_runs_have_the_same_bits(make: object, n: int) -> None:
    w = make(1024, 2048, torch.bfloat16, "cuda")
    x = torch.randn(n, 2048, device="cuda", dtype=torch.bfloat16)
    first = w @ x.t()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results: list[Tensor] = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(w @ x.t())
    torch.cuda.synchronize()
    assert all(torch.equal(result, first) for result in results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_padding_does_not_meet_infinity(dtype: torch.dtype) -> None:
    """A padding entry's code is that of the block's first element; its x must not be multiplied."""
    weight = torch.zeros(256, 256, dtype=dtype, device="cuda")
    weight[70::64, 65::64] = 1.0
    w = CSBMatrix.from_dense(weight, block_size=64)
    assert int(w.blk_pad.max()) == 7
    x = torch.ones(256, dtype=dtype, device="cuda")
    x[::64] = torch.inf
    assert torch.equal(w @ x, weight.sum(1))
    assert torch.equal(w.t() @ x, weight.sum(0))
