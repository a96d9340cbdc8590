"""Variants of a net or of a layer against each other: timed on the same input and judged against float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torch_csb.bench import nets
from torch_csb.bench.judge import WrongResult
from torch_csb.bench.timing import Call, Timing, copies_for_cold_cache, time_all
from torch_csb.nn._layer import CSBLayer

# The dense result must be a fair measure itself, else twice its error would let anything pass.
DENSE_ERROR = 0.1


@torch.no_grad()
def compare(
    parts: dict[str, nn.Module], x: Tensor, device: str, what: str, seconds: float
) -> tuple[int, dict[str, tuple[Timing, float]]]:
    """Times the variants of a net or layer on x and judges what was timed against float64.

    Args:
        parts: "dense" and others; on CUDA in float32 "dense" is timed with TF32 too, as "dense_tf32".
        what: names the case in messages.
        seconds: of sampling.

    Returns:
        The elements of the result, and (timing, relative error) of each variant.

    Raises:
        WrongResult: an error is above its limit.
    """
    want = copy.deepcopy(parts["dense"]).double()(x.double())
    calls: dict[str, list[Call]] = {}
    for name, part in parts.items():
        copies = [(part, x)]
        if device == "cuda":
            touched = nets.weight_bytes(part) + x.nbytes + want.numel() * x.element_size()
            copies += [(copy.deepcopy(part), x.clone()) for _ in range(copies_for_cold_cache(touched) - 1)]
        calls[name] = [_call(*one, tf32=False) for one in copies]
        if device == "cuda" and name == "dense" and x.dtype == torch.float32:
            calls["dense_tf32"] = [_call(*one, tf32=True) for one in copies]
    errors: dict[str, list[float]] = {name: [] for name in calls}

    def judge(name: str, got: Tensor) -> None:
        if got.shape != want.shape:
            raise WrongResult(f"{what}, {name}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}")
        errors[name].append(((got.double() - want).norm() / want.norm()).item())

    timings = time_all(device, calls, seconds, judge)
    limit = max(2 * max(errors["dense"]), error_floor(x.dtype))
    for name, several in errors.items():
        for error in several:
            check_error(error, DENSE_ERROR if name.startswith("dense") else limit, f"{what}, {name}")
    # In 16 bit the rounding of a result hides a small change of one weight.
    csb = parts["csb"]
    if isinstance(csb, CSBLayer) and not torch.equal(csb.to_dense().weight, parts["dense"].weight):
        raise WrongResult(f"{what}, csb: expected the weights that dense has, got others")
    return want.numel(), {name: (timing, max(errors[name])) for name, timing in timings.items()}


def error_floor(dtype: torch.dtype) -> float:
    """A relative error that is always right, for a dense result that is lucky: 32 eps, in 16 bit eps, since those
    results are rounded once from wider sums (32 eps of bfloat16 would be a quarter of the result)."""
    eps = torch.finfo(dtype).eps
    return eps if dtype.itemsize == 2 else 32 * eps


def check_error(error: float, limit: float, what: str) -> None:
    """Raises WrongResult where the error is above its limit, or no number."""
    if not error <= limit:
        raise WrongResult(f"{what}: relative error {error:.3g} against float64, expected at most {limit:.3g}")


def _call(part: nn.Module, x: Tensor, *, tf32: bool) -> Call:
    def call() -> Tensor:
        with _tf32(tf32):
            return part(x)

    return call


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """In products and in convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
