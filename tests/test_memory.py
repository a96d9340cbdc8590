"""Bytes: what a layer holds, and what a forward and a backward take on the way.

Run as a script, this file is the probe of the CPU tests: a process whose peak of resident memory is its own.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
import torch.nn.functional as F
from cases import run_script
from torch import Tensor, nn

from torch_csb import CSBLinear, CSBMatrix, autograd, ops
from torch_csb.testing import uniform

Product = Callable[[CSBMatrix, Tensor, int], Tensor]


def csb(w: CSBMatrix, x: Tensor, dim: int) -> Tensor:
    return ops.spmm(w, x, dim=dim)


def with_a_dense_weight(w: CSBMatrix, x: Tensor, dim: int) -> Tensor:
    """The negative control of the weight: right, and with an m x k temporary."""
    from torch_csb import reference

    at = reference.decode(w)
    dense = torch.zeros(w.m, w.k, dtype=w.dtype, device=w.device).index_put((at.row, at.col), w.values[at.index])
    return F.linear(x.movedim(dim, -1), dense).movedim(-1, dim)


def with_copies(w: CSBMatrix, x: Tensor, dim: int) -> Tensor:
    """The negative control of the activations: features last, made so by copies."""
    return ops.spmm(w, x.movedim(dim, -1).contiguous()).movedim(-1, dim).contiguous()


IMPLEMENTATIONS: dict[str, Product] = {f.__name__: f for f in (csb, with_a_dense_weight, with_copies)}


def weight_case(device: str) -> tuple[CSBMatrix, Tensor, int, int]:
    """4096 x 4096, 90 %, 8 columns. The limit is 10 % of a dense weight."""
    weight = torch.randn(4096, 4096) * uniform(4096, 4096, 0.9)
    w = CSBMatrix.from_dense(weight.to(device))
    return w, torch.randn(8, 4096, device=device), -1, weight.nbytes // 10


def activation_case(device: str) -> tuple[CSBMatrix, Tensor, int, int]:
    """Images of 56 x 56, NCHW. The limit is half of what a copy of the input takes."""
    weight = torch.randn(192, 128) * uniform(192, 128, 0.9)
    x = torch.randn(24, 128, 56, 56, device=device)
    return CSBMatrix.from_dense(weight.to(device)), x, 1, x.nbytes // 2


CASES = {f.__name__: f for f in (weight_case, activation_case)}
CONTROLS = [("weight_case", "with_a_dense_weight"), ("activation_case", "with_copies")]


def kept_bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def train(product: Product, w: CSBMatrix, x: Tensor, dim: int, grad: Tensor) -> int:
    """A forward and a backward; the bytes of the results, which any implementation must hold."""
    w.values.requires_grad_()
    y = product(w, x.requires_grad_(), dim)
    results = torch.autograd.grad(y, (w.values, x), grad)
    return kept_bytes(y, *results)


# --- CPU: a process of its own ----------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def probe(case: str, implementation: str) -> tuple[int, int]:
    """Bytes of resident memory that a step took beside its results, and the limit."""
    torch.set_num_threads(2)  # every thread keeps tile buffers of its own, whatever the size of W
    product = IMPLEMENTATIONS[implementation]
    small = CSBMatrix.from_dense(torch.ones(64, 64))
    train(product, small, torch.randn(2, 64), -1, torch.randn(2, 64))  # loads code and starts threads
    w, x, dim, limit = CASES[case]("cpu")
    shape = list(x.shape)
    shape[dim] = w.m
    grad = torch.randn(shape)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_bytes("VmRSS")
    assert status_bytes("VmHWM") < before + (1 << 20), "the peak could not be reset"
    results = train(product, w, x, dim, grad)
    return status_bytes("VmHWM") - before - results, limit


def probe_in_a_process(case: str, implementation: str) -> tuple[int, int]:
    extra, limit = run_script(__file__, case, implementation).split()
    return int(extra), int(limit)


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")


@linux
@pytest.mark.parametrize("case", CASES)
def test_a_training_step_on_the_cpu_makes_no_large_temporary(case: str) -> None:
    extra, limit = probe_in_a_process(case, "csb")
    print(f"{case}: {extra / 2**20:.1f} MiB beside the results, limit {limit / 2**20:.1f}")
    assert extra < limit


@linux
@pytest.mark.parametrize(("case", "implementation"), CONTROLS)
def test_the_probe_sees_a_large_temporary(case: str, implementation: str) -> None:
    extra, limit = probe_in_a_process(case, implementation)
    assert extra > limit


# --- CUDA: the allocator counts ---------------------------------------------------------------------------------------


def cuda_extra(case: str, implementation: str) -> tuple[int, int]:
    w, x, dim, limit = CASES[case]("cuda")
    shape = list(x.shape)
    shape[dim] = w.m
    grad = torch.randn(shape, device="cuda")
    train(IMPLEMENTATIONS[implementation], w, x, dim, grad)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = train(IMPLEMENTATIONS[implementation], w, x, dim, grad)
    return torch.cuda.max_memory_allocated() - before - results, limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_a_training_step_on_cuda_makes_no_large_temporary(case: str) -> None:
    extra, limit = cuda_extra(case, "csb")
    if case == "activation_case":
        limit += 32 << 20  # from 256 columns on, a panel of W may be made
    print(f"{case}: {extra / 2**20:.1f} MiB beside the results, limit {limit / 2**20:.1f}")
    assert extra < limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("case", "implementation"), CONTROLS)
def test_the_cuda_probe_sees_a_large_temporary(case: str, implementation: str) -> None:
    extra, limit = cuda_extra(case, implementation)
    assert extra > limit


# --- what a layer holds -----------------------------------------------------------------------------------------------


def held_bytes(root: object) -> int:
    """The storages of every tensor that can be reached from an object, each once; gradients are not the layer's."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        else:
            stack.extend(gc.get_referents(thing))
    return sum(storages.values())


@pytest.mark.parametrize(
    ("dtype", "of_csr", "of_both"), [(torch.float32, 0.78, 0.40), (torch.bfloat16, 0.70, None)], ids=["fp32", "bf16"]
)
def test_storage_of_a_layer(dtype: torch.dtype, of_csr: float, of_both: float | None, device: str) -> None:
    """After a forward and a backward, against CSR with int32 indices, and against CSR and CSC together."""
    linear = nn.Linear(4096, 4096, bias=False, device=device, dtype=dtype)
    linear.weight.data *= uniform(4096, 4096, 0.9).to(device)
    layer = CSBLinear.from_dense(linear)
    x = torch.randn(8, 4096, device=device, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert layer.values.grad is not None
    layer.zero_grad()
    matrix_bytes = sum(t.nbytes for t in (layer.values, layer.codes, layer.blk_ptr, layer.blk_pad, layer.units))
    held = held_bytes(layer)
    assert matrix_bytes <= held < matrix_bytes + 1024
    csr = layer.nnz * (dtype.itemsize + 4) + 4 * 4097
    print(f"{dtype}: {held / 2**20:.2f} MiB, {held / csr:.3f} of CSR, {held / (2 * csr):.3f} of CSR + CSC")
    assert held <= of_csr * csr
    if of_both is not None:
        assert held <= of_both * 2 * csr


def test_held_bytes_finds_a_hidden_copy() -> None:
    layer = CSBLinear.from_dense(nn.Linear(64, 64, bias=False))
    held = held_bytes(layer)
    layer.cache = {"dense": [torch.zeros(64, 64)]}
    assert held_bytes(layer) == held + 64 * 64 * 4


def test_saved_for_backward_is_the_inputs_alone(device: str) -> None:
    """No activation is kept that the caller doesn't hold anyway, but the output where relu needs it."""
    w = CSBMatrix.from_dense(torch.randn(64, 48, device=device))
    w.values.requires_grad_()
    x = torch.randn(9, 48, device=device)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for act in (None, "relu"):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = ops.spmm(w, x, activation=act)
        known = {t.data_ptr() for t in (w.values, w.codes, w.blk_ptr, w.blk_pad, w.units, x, y)}
        assert saved and {t.data_ptr() for t in saved} <= known
        assert (y.data_ptr() in {t.data_ptr() for t in saved}) == (act == "relu")


def test_no_cache_survives_a_call() -> None:
    """Nothing in the package's modules grows by calling it: no cache keyed by an address."""
    w = CSBMatrix.from_dense(torch.randn(300, 300))
    before = held_bytes(vars(autograd)) + held_bytes(vars(ops))
    ops.spmm(w, torch.randn(8, 300))
    assert held_bytes(vars(autograd)) + held_bytes(vars(ops)) == before


if __name__ == "__main__":
    print(*probe(sys.argv[1], sys.argv[2]))
