"""Whether a dense product would be faster than a CSB one.

CPUs, and few columns on a GPU, have a sparsity from which CSB wins. Many columns on a GPU have a rule that is linear in
the logarithms of the sizes: tools/fit_winner.py fits it to the rows of benchmarks/results and says how often it is
right, on layers too that it was not fitted to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """CSB wins where ``constant`` + ``weights`` . terms > 0, for ``least`` to ``most`` columns.

    More input features than ``depth``, or more output features than ``features``, make no further difference."""

    least: int
    most: float
    depth: int
    features: int
    constant: float
    weights: tuple[float, ...]

    def terms(self, features: int, depth: int, n: int, sparsity: float) -> list[float]:
        sizes = (
            max(1 - sparsity, 0.05),
            min(depth, self.depth),
            min(features, self.features),
            min(features * n, 2**20),
            min(max(n, 512), 2048),
            min(n, 2**20),
        )
        return [math.log(max(size, 1e-9)) for size in sizes]

    def csb_wins(self, features: int, depth: int, n: int, sparsity: float) -> bool:
        terms = self.terms(features, depth, n, sparsity)
        return self.constant + sum(w * term for w, term in zip(self.weights, terms, strict=True)) > 0


# Measured on an H200: products in 16 bit, and in float32. Beyond 255 columns a 16-bit product runs through a panel of
# the dense weight, which can't be faster than the dense product it is made of.
RULE_16_BIT = Rule(9, 255, 8192, 2048, -34.16, (-3.03, 2.39, 0.80, 0.36, 0.00, -1.22))
RULE_FLOAT32 = Rule(17, math.inf, 2048, 512, -67.48, (-4.10, 1.98, 1.74, 1.88, 0.98, 0.33))
# The gradient of the weight in float32, with W's output features and input features.
RULE_FLOAT32_DW = Rule(1, math.inf, 2048, 2048, -52.39, (-3.49, 1.26, 1.71, 1.12, 0.48, 0.71))

# Up to which number of columns: from which sparsity. Nothing below 0.5 was measured.
_FEW_16_BIT = ((1, 0.72), (8, 0.78))
_FEW_16_BIT_LARGE = ((1, 0.5), (8, 0.5))  # weights whose bitmap takes memory longer than a launch
_LARGE = 2**27
_FEW_FLOAT32 = ((1, 0.65), (8, 0.5), (16, 0.78))
# On two cores of an AVX-512 CPU.
_CPU = {
    "spmm": ((1, 0.52), (127, 0.5), (math.inf, 0.55)),
    "spmm_t": ((1, 0.76), (31, 0.5), (127, 0.6), (math.inf, 0.7)),
    "sddmm": ((1, 0.57), (127, 0.5), (math.inf, 0.64)),
}


def dense_wins(operator: str, cuda: bool, item_bytes: int, features: int, depth: int, n: int, sparsity: float) -> bool:
    """Of ``operator`` ("spmm", "spmm_t" or "sddmm") with ``features`` outputs of ``depth`` inputs each, n columns."""
    if cuda and operator == "sddmm":  # in 16 bit dense did in every case measured; float64 was not measured
        return item_bytes != 4 or not RULE_FLOAT32_DW.csb_wins(features, depth, n, sparsity)
    few_16_bit = _FEW_16_BIT_LARGE if features * depth >= _LARGE else _FEW_16_BIT
    few = (few_16_bit if item_bytes == 2 else _FEW_FLOAT32) if cuda else _CPU[operator]
    for most, crossing in few:
        if n <= most:
            return sparsity < crossing
    rule = RULE_16_BIT if item_bytes == 2 else RULE_FLOAT32
    return n > rule.most or not rule.csb_wins(features, depth, n, sparsity)
