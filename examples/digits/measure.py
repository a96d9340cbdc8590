"""Bytes read off the tensors, and latencies as medians of repeated calls."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TURNS = 5


@dataclass(frozen=True)
class Bytes:
    """What a model holds while it trains. Buffers that describe a pattern (masks, indices, plan) count as weights."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Bytes:
    """Sum over storages, each counted once, after a backward and a step.

    The effective weight that torch.nn.utils.prune keeps beside `weight_orig` and `weight_mask` is not counted: it is a
    temporary of the forward.
    """
    state = (t for slots in optimizer.state.values() for t in slots.values() if isinstance(t, Tensor))
    return Bytes(
        weights=_storage_bytes([*model.parameters(), *model.buffers()]),
        gradients=_storage_bytes([p.grad for p in model.parameters() if p.grad is not None]),
        optimizer=_storage_bytes(state),
    )


def _storage_bytes(tensors) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@dataclass(frozen=True)
class Latency:
    """Microseconds; None where a backend cannot run the case."""

    case: str
    masked_dense: float
    csr: float | None
    csb: float


def medians_us(calls: list[Callable[[], object]], seconds: float, device: torch.device) -> list[float]:
    """Median time of each call over about `seconds`; the calls take turns, so a busy moment hits them all alike."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(1 + TURNS):
        for call, taken in zip(calls, times, strict=True):
            synchronize()
            deadline = time.perf_counter() + seconds / TURNS
            while True:
                start = time.perf_counter()
                call()
                synchronize()
                end = time.perf_counter()
                if turn > 0:  # the first turn warms up
                    taken.append(end - start)
                if end > deadline:
                    break
    return [1e6 * statistics.median(taken) for taken in times]


def latencies(
    masked: nn.Module,
    dense: nn.Module,
    csb: nn.Module,
    *,
    device: torch.device,
    seconds: float,
    on_case: Callable[[str], None],
) -> list[Latency]:
    """Forward of two layers and of the model, and one training step, each at two or three batch sizes.

    `masked` carries torch.nn.utils.prune masks, in `dense` they are multiplied in, `csb` is the converted model. CSB's
    inference is compared against `dense`, its training against `masked`. CSR is torch.sparse's, given the layout
    that its product needs ([features, columns]); the time for bringing an activation there is part of its time.
    """
    dense.eval()
    csb.eval()
    rows: list[Latency] = []

    def compare(case: str, run_dense, run_csr, run_csb) -> None:
        on_case(case)
        with torch.no_grad():
            calls = [call for call in (run_dense, run_csb, run_csr) if call is not None]
            times = medians_us(calls, seconds, device)
        rows.append(Latency(case, times[0], times[2] if run_csr else None, times[1]))

    hidden_csr, mix_csr = _csr(dense.hidden.weight), _csr(dense.mix.pointwise.weight.flatten(1))
    for n in (1, 64, 512):
        x = torch.randn(n, 1024, device=device)
        compare(
            f"Linear 1024 → 512, batch {n}",
            lambda x=x: dense.hidden(x),
            lambda x=x: torch.addmm(dense.hidden.bias[:, None], hidden_csr, x.t()).t(),
            lambda x=x: csb.hidden(x),
        )
    for n in (1, 64):
        x = torch.randn(n, 256, 4, 4, device=device)
        compare(
            f"1x1 conv 256 → 256 on 4x4, batch {n}",
            lambda x=x: dense.mix.pointwise(x),
            lambda x=x: _csr_conv(mix_csr, x, dense.mix.pointwise.bias),
            lambda x=x: csb.mix.pointwise(x),
        )
    for n in (1, 64):
        x = torch.randn(n, 1, 8, 8, device=device)
        compare(f"whole net, batch {n}", lambda x=x: dense(x), None, lambda x=x: csb(x))

    x = torch.randn(64, 1, 8, 8, device=device)
    on_case("training step")
    times = medians_us([lambda: _forward_backward(masked, x), lambda: _forward_backward(csb, x)], seconds, device)
    rows.append(Latency("whole net, forward + backward, batch 64", times[0], None, times[1]))
    return rows


def _csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR.*")
        return weight.detach().to_sparse_csr()


def _csr_conv(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    columns = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1)
    y = torch.addmm(bias[:, None], weight, columns)
    return y.view(-1, x.shape[0], *x.shape[2:]).permute(1, 0, 2, 3)


def _forward_backward(model: nn.Module, x: Tensor) -> None:
    model.train()
    model.zero_grad()
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()
