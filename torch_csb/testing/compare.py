"""The judge. A result must pass two tests, and not one element may fail the first.

1. Every element: ``|y - ref| <= c * terms * u * sum |a||x|``, the forward error bound of a sum of ``terms`` products in
   any order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), u the unit roundoff of the
   accumulator, plus one rounding to the output's dtype.
2. The whole: ``||y - ref|| / ||ref||`` at most twice the error of PyTorch's own dense product in the same dtype. The
   first test alone would let TF32 pass as float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_csb import reference

if TYPE_CHECKING:
    from torch_csb.matrix import CSBMatrix

# Head room of the element-wise bound: fused multiply-adds, joins of split sums and tensor cores that truncate.
SUM_FACTOR = 2.0
# Slopes of silu and gelu are below 1.2; a polynomial exp or erf in the accumulator's precision adds a few roundings.
ACTIVATION_SLOPE = 1.2
ACTIVATION_ROUNDINGS = 16.0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What kernels add up in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Expected:
    """A float64 reference with the bounds that belong to it."""

    value: Tensor  # float64
    bound: Tensor  # float64, same shape: the largest allowed |actual - value|
    relative: float  # the largest allowed ||actual - value|| / ||value||
    dtype: torch.dtype  # of the result


def _relative(difference: Tensor, value: Tensor) -> float:
    # A non-finite reference element is judged by equality, not by its distance.
    finite = value.isfinite() & difference.isfinite()
    error, size = difference[finite].norm().item(), value[finite].norm().item()
    return error / size if size else (0.0 if error == 0 else float("inf"))


def expected(
    value: Tensor,
    magnitude: Tensor,
    terms: Tensor | int,
    own: Tensor,
    *,
    activated: bool = False,
) -> Expected:
    """Bounds for ``value``.

    Args:
        value: the float64 reference.
        magnitude: sum |a||x| before the activation, float64.
        terms: how many terms that sum has; a tensor must broadcast to ``value``.
        own: PyTorch's result; its dtype is the one under test.
        activated: whether an activation with an exp or erf follows (relu and relu6 round nothing).
    """
    dtype = own.dtype
    unit, unit_sum = unit_roundoff(dtype), unit_roundoff(accumulator(dtype))
    info = torch.finfo(dtype)
    terms = torch.as_tensor(terms, dtype=torch.float64, device=value.device)
    bound = SUM_FACTOR * (terms + 1) * unit_sum * magnitude
    if activated:
        bound = ACTIVATION_SLOPE * bound + ACTIVATION_ROUNDINGS * unit_sum * magnitude
    # One rounding of a computed value that is itself off by the bound, or half a subnormal step.
    bound = bound + unit * (value.abs() + bound) + info.smallest_normal * info.eps
    bound = torch.where(magnitude == 0, torch.zeros_like(bound), bound) if not activated else bound

    # PyTorch may be lucky on few elements, so the limit never falls below what any order of summation costs. The 2 is
    # for errors that are not independent (equal terms round alike) and, in float64, for the reference's own.
    most_terms = terms.max().item() if terms.numel() else 0.0
    floor = unit + 2 * unit_sum * max(most_terms**0.5, min(_condition(magnitude, value), 1 / unit_sum))
    floor += ACTIVATION_ROUNDINGS * unit_sum if activated else 0.0
    own_error = _relative(own.double() - value, value)
    return Expected(value, bound, max(2 * own_error, floor), dtype)


def _condition(magnitude: Tensor, value: Tensor) -> float:
    finite = value.isfinite() & magnitude.isfinite()
    size = value[finite].norm().item()
    return magnitude[finite].norm().item() / size if size else 0.0


def _expect_product(
    dense: Tensor, kept: Tensor, x: Tensor, bias: Tensor | None, activation: str | None, dim: int
) -> Expected:
    bias64 = None if bias is None else bias.double()
    value = reference.apply(dense.double(), x.double(), bias64, activation, dim)
    magnitude = reference.apply(
        dense.double().abs(), x.double().abs(), None if bias64 is None else bias64.abs(), None, dim
    )
    terms = kept.sum(1).double() + (bias is not None)
    own = reference.apply(dense, x, bias, activation, dim)
    features = [1] * x.dim()
    features[dim] = -1
    return expected(value, magnitude, terms.view(features), own, activated=activation in ("silu", "gelu"))


def expect_spmm(
    w: CSBMatrix, x: Tensor, bias: Tensor | None = None, activation: str | None = None, dim: int = -1
) -> Expected:
    """What ``act(W X + b)`` must give for these very bits of W, X and b."""
    dense = reference.to_dense(w)
    return _expect_product(dense, _kept(w), x, bias, activation, dim)


def expect_spmm_t(
    w: CSBMatrix, x: Tensor, bias: Tensor | None = None, activation: str | None = None, dim: int = -1
) -> Expected:
    """What ``act(W^T X + b)`` must give."""
    dense = reference.to_dense(w).mT
    return _expect_product(dense, _kept(w).mT, x, bias, activation, dim)


def expect_sddmm(w: CSBMatrix, a: Tensor, b: Tensor, dim: int = -1) -> Expected:
    """What ``(A B^T)`` at W's entries must give; padding must be exactly zero."""
    columns = a.numel() // a.shape[dim] if a.numel() else 0
    return expected(
        reference.sddmm(w, a.double(), b.double(), dim=dim),
        reference.sddmm(w, a.double().abs(), b.double().abs(), dim=dim),
        columns,
        reference.sddmm(w, a, b, dim=dim),
    )


def _kept(w: CSBMatrix) -> Tensor:
    at = reference.decode(w)
    kept = torch.zeros(w.m, w.k, dtype=torch.bool, device=at.row.device)
    kept[at.row, at.col] = True
    return kept


def compare(actual: Tensor, expect: Expected, case: str | Callable[[], str] = "") -> None:
    """Raises ``AssertionError`` unless ``actual`` passes both tests; the message names the worst element."""
    name = case() if callable(case) else case
    if actual.dtype != expect.dtype or actual.shape != expect.value.shape:
        raise AssertionError(
            f"{name}: expected {expect.dtype} {tuple(expect.value.shape)}, got {actual.dtype} {tuple(actual.shape)}"
        )
    if actual.numel() == 0:
        return
    got = actual.detach().double()
    # An overflow or a NaN of the reference must be there, and nowhere else.
    want = torch.where(expect.value.to(actual.dtype).isfinite(), expect.value, expect.value.to(actual.dtype).double())
    same = (got == want) | (got.isnan() & want.isnan())
    difference = (got - want).abs()
    over = ~(same | (want.isfinite() & (difference <= expect.bound)))
    if over.any():
        excess = torch.where(over, (difference - expect.bound).nan_to_num(torch.inf, torch.inf), -1.0)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}: element {worst}: expected {want[worst].item():.9g}, got {got[worst].item():.9g}, "
            f"off by {difference[worst].item():.3g}, bound {expect.bound[worst].item():.3g}; "
            f"{int(over.sum())} of {over.numel()} elements are over their bound"
        )
    relative = _relative(got - want, want)
    if relative > expect.relative:
        worst = tuple(int(i) for i in torch.unravel_index(torch.where(same, 0.0, difference).argmax(), got.shape))
        raise AssertionError(
            f"{name}: relative error {relative:.3g}, allowed {expect.relative:.3g} (twice PyTorch's own); the element "
            f"furthest off is {worst}: expected {want[worst].item():.9g}, got {got[worst].item():.9g}"
        )
