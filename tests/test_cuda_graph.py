"""What CUDA callers rely on: streams, graphs, no synchronisation, the same bits."""

from __future__ import annotations

import pytest
import torch
from cases import random_matrix
from torch import Tensor

from torch_csb import CSBMatrix, ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Columns of each kernel: a vector, one and several tiles of the tensor-core kernel, and beyond 256.
COLUMNS = (1, 8, 33, 130, 300)
DTYPES = (torch.float32, torch.bfloat16)


def make(dtype: torch.dtype, n: int) -> tuple[CSBMatrix, Tensor, Tensor]:
    w = random_matrix(520, 1300, 0.8, dtype, "cuda")
    return w, torch.randn(n, w.k, device="cuda", dtype=dtype), torch.randn(n, w.m, device="cuda", dtype=dtype)


def all_three(w: CSBMatrix, x: Tensor, y: Tensor) -> list[Tensor]:
    return [ops.spmm(w, x, activation="relu"), ops.spmm_t(w, y), ops.sddmm(w, y, x)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capture_and_replay(dtype: torch.dtype, n: int) -> None:
    w, x, y = make(dtype, n)
    all_three(w, x, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = all_three(w, x, y)
    for _ in range(3):
        x.normal_()
        y.normal_()
        w.values.mul_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert equal(captured, all_three(w, x, y))


def test_capture_of_a_training_step() -> None:
    w, x, y = make(torch.float32, 40)
    w.values.requires_grad_()
    x.requires_grad_()

    def step() -> list[Tensor]:
        out = ops.spmm(w, x)
        return [out.detach(), *torch.autograd.grad(out, (w.values, x), y)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert equal(captured, want)


def busy(milliseconds: float = 30) -> None:
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_current_stream_is_honoured(dtype: torch.dtype, n: int) -> None:
    """The inputs are written late on a side stream: a kernel on another stream would read the old ones."""
    w, x, y = make(dtype, n)
    new_x, new_y = torch.randn_like(x), torch.randn_like(y)
    want = all_three(w, new_x, new_y)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        x.copy_(new_x)
        y.copy_(new_y)
        got = all_three(w, x, y)
    stream.synchronize()
    assert equal(got, want)


def test_two_streams_run_one_matrix() -> None:
    """Counters or buffers that survive a call would mix the two up."""
    w, x, y = make(torch.float32, 40)
    inputs = [(torch.randn_like(x), torch.randn_like(y)) for _ in range(2)]
    want = [all_three(w, a, b) for a, b in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    got: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(all_three(w, *inputs[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(equal(results, want[i]) for results in got[i])


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_synchronisation(dtype: torch.dtype, n: int) -> None:
    w, x, y = make(dtype, n)
    all_three(w, x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy(50)
        all_three(w, x, y)
        done = torch.cuda.current_stream().query()  # torch's own check can't see a synchronisation inside our library
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not done, "the call returned only after the stream had run dry"
    torch.cuda.synchronize()


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_in_twenty_runs(dtype: torch.dtype, n: int) -> None:
    w, x, y = make(dtype, n)
    first = all_three(w, x, y)
    noise = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):  # disturbs the order in which thread blocks are scheduled
            noise @ noise
        assert equal(all_three(w, x, y), first)


def test_conversion_on_the_current_stream() -> None:
    weight = torch.zeros(300, 400, device="cuda")
    late = torch.randn(300, 400, device="cuda") * (torch.rand(300, 400, device="cuda") < 0.2)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        weight.copy_(late)
        w = CSBMatrix.from_dense(weight)
        dense = w.to_dense()
    stream.synchronize()
    assert torch.equal(dense, late)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_guard() -> None:
    """The operands' device runs the kernel, whatever device is current."""
    with torch.cuda.device(1):
        w, x, y = make(torch.float32, 9)
    with torch.cuda.device(0):
        got = all_three(w, x, y)
    assert all(result.device.index == 1 for result in got)
    torch.testing.assert_close(got[1], y @ w.to_dense())
