"""Whether a timed result is right, and whether the weight it was computed from still is."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_csb.bench.implementations import Implementation

# Head room over the standard deviation of a sum's rounding error; the sums that are right stay below half of it.
DEVIATIONS = 4.0
# Libraries choose their own precision of sums and split products; beyond these they are wrong, not rough.
LIBRARY_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TF32_ERROR = 2e-3
LIBRARIES = ("dense", "dense_tf32", "torch_csr")


class WrongResult(Exception):
    """A timed result differs from float64 by more than rounding, or a weight is not the one that was packed."""


class Judge:
    """The float64 result of one product with an error bound for every element.

    ``|got - want| <= 4 u sqrt(terms) ||a o x||_2 + u_out |want|``: rounding errors of a sum of ``terms`` products
    behave like a random walk (Higham and Mary, "A new approach to probabilistic rounding error analysis", SISC 2019).
    The worst-case bound grows with ``terms`` itself and would hide an entry that is off by 1 %. In 16 bit ``terms`` is
    added to ``4 sqrt(terms)``: tensor cores cut sums off, so that their errors all point one way.

    Args:
        dense: W, [m, k].
        x: [n, k] or None.
        y: [n, m] or None; "F" needs x, "T" y, "dW" both.
    """

    def __init__(self, dense: Tensor, direction: str, x: Tensor | None, y: Tensor | None) -> None:
        self.direction = direction
        self.dtype = dense.dtype
        kept = dense != 0
        if direction == "dW":
            left, right, terms = y.t(), x, torch.tensor(float(len(x)), device=dense.device)
        elif direction == "F":
            left, right, terms = x, dense.t(), kept.sum(1)
        else:
            left, right, terms = y, dense, kept.sum(0)
        self.want = left.double() @ right.double()
        unit = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps
        spread = (left.float().square() @ right.float().square()).sqrt_()
        info = torch.finfo(self.dtype)
        terms = terms.double()
        deviations = DEVIATIONS * terms.sqrt() + (terms if self.dtype.itemsize == 2 else 0.0)
        self.bound = spread.double() * (unit * deviations)
        self.bound += self.want.abs() * (0.501 * info.eps) + info.smallest_normal * info.eps

    def relative_error(self, implementation: Implementation, w: object, layout: str, result: object) -> float:
        """Relative error in the Frobenius norm. Raises WrongResult."""
        want, bound = self.want, self.bound
        if self.direction == "dW":
            got, row, col = implementation.sampled(w, result)
            want, bound = want[row, col], bound[row, col]
        else:
            got = result if layout == "last" else result.t()
        if got.shape != want.shape:
            raise WrongResult(f"{implementation.name}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}")
        difference = (got.double() - want).abs_()
        size = want.norm().item()
        error = difference.norm().item() / size if size else difference.norm().item()
        if implementation.name in LIBRARIES:
            limit = TF32_ERROR if implementation.name == "dense_tf32" else LIBRARY_ERROR[self.dtype]
            if not error <= limit:
                raise WrongResult(f"{implementation.name}: relative error {error:.3g}, at most {limit:g} is rounding")
            return error
        wrong = ~(difference <= bound)
        if wrong.any():
            at = tuple(int(i) for i in torch.unravel_index((difference / bound).argmax(), wrong.shape))
            raise WrongResult(
                f"{implementation.name}: element {at}: expected {want[at].item():.9g}, got {got[at].item():.9g}, bound "
                f"{bound[at].item():.3g}; {int(wrong.sum())} of {wrong.numel()} elements are wrong"
            )
        return error


def check_weight(implementation: Implementation, w: object, direction: str, dense: Tensor) -> None:
    """Raises WrongResult unless ``w`` holds ``dense`` to the bit: a 16-bit output's rounding hides a small change."""
    held = implementation.unpack(w, direction)
    if not torch.equal(held, dense):
        at = tuple(int(i) for i in (held != dense).nonzero()[0])
        raise WrongResult(
            f"{implementation.name}: the weight changed: element {at}: expected {dense[at].item():.9g}, "
            f"got {held[at].item():.9g}"
        )
