"""Whatever the shape, pattern, dtype, layout and arguments: the operators are within derived bounds of a float64
reference, and conversions keep every entry.

`TORCH_CSB_EXAMPLES=10000 pytest tests/test_property.py` draws that many random examples for each test; without it a few
hundred fixed ones run.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis", reason="the property tests draw their cases with hypothesis")

from cases import ACTIVATIONS, BLOCKS, DTYPES, LAYOUTS, activation, packing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_csb import CSBLinear, CSBMatrix, ops, reference
from torch_csb.testing import compare
from torch_csb.testing.compare import expected

EXAMPLES = os.environ.get("TORCH_CSB_EXAMPLES")
PATTERNS = ("uniform", "full_rows", "full_columns", "empty_blocks", "diagonal", "one_entry", "ragged_rows")
# Sizes at the edges of tiles and blocks, and any others. Most are small: what is wrong shows there too, and sooner.
SIZE = st.one_of(
    st.integers(0, 20),
    st.integers(0, 140),
    st.sampled_from((15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)),
)


def examples(fixed: int) -> settings:
    return settings(
        max_examples=int(EXAMPLES or fixed),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Weight(NamedTuple):
    m: int
    k: int
    pattern: str
    density: float
    blocks: int | str
    dtype: torch.dtype
    zeros: bool  # some entries of the mask hold the value 0
    seed: int

    def mask(self) -> Tensor:
        m, k = self.m, self.k
        kept = torch.rand(m, k) < self.density
        if self.pattern == "full_rows":
            kept |= torch.rand(m, 1) < 0.1
        elif self.pattern == "full_columns":
            kept |= torch.rand(1, k) < 0.1
        elif self.pattern == "empty_blocks":
            tiles = torch.rand(-(-m // 16), -(-k // 16)) < 0.5
            kept &= tiles.repeat_interleave(16, 0).repeat_interleave(16, 1)[:m, :k]
        elif self.pattern == "diagonal":
            kept = torch.eye(m, k, dtype=torch.bool)
        elif self.pattern == "one_entry":
            kept = torch.zeros(m, k, dtype=torch.bool)
            kept.view(-1)[self.seed % max(m * k, 1) : self.seed % max(m * k, 1) + 1] = True
        elif self.pattern == "ragged_rows":
            kept &= torch.arange(k) < (torch.rand(m, 1) ** 3 * (k + 1)).long()
        return kept

    def dense_and_mask(self, device: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(self.seed)
        mask = self.mask()
        dense = torch.randn(self.m, self.k).to(self.dtype)
        # 16 bits have no smaller numbers that are still normal in every product.
        dense = dense.sign() * dense.abs().clamp_min(2.0**-6)
        if self.zeros:
            dense *= torch.rand(self.m, self.k) < 0.7
        return dense.to(device), mask.to(device)

    def matrix(self, device: str) -> CSBMatrix:
        dense, mask = self.dense_and_mask(device)
        return CSBMatrix.from_dense(dense, mask, **packing(self.blocks))


WEIGHT = st.builds(
    Weight,
    m=SIZE,
    k=SIZE,
    pattern=st.sampled_from(PATTERNS),
    density=st.one_of(st.sampled_from((0.0, 0.02, 0.1, 0.5, 1.0)), st.floats(0, 1)),
    blocks=st.sampled_from((*BLOCKS, 2, 4, 8)),
    dtype=st.sampled_from(DTYPES),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
COLUMNS = st.one_of(st.integers(0, 40), st.sampled_from((64, 65, 127, 128, 256)))


class Judge:
    """Bounds of each element of a product with W, in float64.

    The judge of other tests also compares the whole error with PyTorch's own, which says something of many elements; an
    example may have one, and luck decides.
    """

    def __init__(self, w: CSBMatrix) -> None:
        self.at = reference.decode(w)
        self.stored = w.values.numel()
        self.dense = reference.to_dense(w).double()
        self.kept = torch.zeros_like(self.dense)
        self.kept[self.at.row, self.at.col] = 1

    def product(self, got: Tensor, x: Tensor, bias: Tensor | None, act: str | None, dim: int, transposed: bool) -> None:
        w, kept = (self.dense.mT, self.kept.mT) if transposed else (self.dense, self.kept)
        x, b = x.detach().double(), None if bias is None else bias.double()
        value = reference.apply(w, x, b, act, dim)
        magnitude = reference.apply(w.abs(), x.abs(), None if b is None else b.abs(), None, dim)
        shape = [1] * x.dim()
        shape[dim] = -1
        terms = (kept.sum(1) + (b is not None)).view(shape)
        within(got, value, magnitude, terms, activated=act in ("silu", "gelu"))

    def sampled(self, got: Tensor, a: Tensor, b: Tensor, dim: int) -> None:
        a, b = a.detach().double(), b.detach().double()
        at, columns = self.at, a.numel() // a.shape[dim] if a.numel() else 0
        value, magnitude = torch.zeros(2, self.stored, dtype=torch.float64, device=a.device)
        value[at.index] = reference.outer(a, b, dim)[at.row, at.col]
        magnitude[at.index] = reference.outer(a.abs(), b.abs(), dim)[at.row, at.col]
        within(got, value, magnitude, columns)


def within(got: Tensor, value: Tensor, magnitude: Tensor, terms: Tensor | int, *, activated: bool = False) -> None:
    bounds = expected(value, magnitude, terms, got.detach(), activated=activated)
    compare(got, replace(bounds, relative=math.inf))


@examples(200)
@given(
    weight=WEIGHT,
    n=COLUMNS,
    layout=st.sampled_from(tuple(LAYOUTS)),
    bias=st.booleans(),
    act=st.sampled_from(ACTIVATIONS),
)
def test_products_and_gradients_of_the_weight(device, weight, n, layout, bias, act):
    w = weight.matrix(device)
    x, dim = activation(layout, w.k, n, w.dtype, device)
    y, _ = activation(layout, w.m, n, w.dtype, device)
    b, c = (torch.randn(w.m).to(x), torch.randn(w.k).to(x)) if bias else (None, None)
    judge = Judge(w)
    judge.product(ops.spmm(w, x, b, activation=act, dim=dim), x, b, act, dim, False)
    judge.product(ops.spmm_t(w, y, c, activation=act, dim=dim), y, c, act, dim, True)
    judge.sampled(ops.sddmm(w, y, x, dim=dim), y, x, dim)


@examples(150)
@given(weight=WEIGHT)
def test_conversions_keep_every_entry_and_nothing_else(device, weight):
    dense, mask = weight.dense_and_mask(device)
    w = CSBMatrix.from_dense(dense, mask, **packing(weight.blocks))
    kept = torch.where(mask, dense, 0)
    w.validate()
    assert w.nnz == int(mask.sum()) and w.values.numel() == int(w.blk_ptr[-1])
    assert torch.equal(w.to_dense(), kept) and torch.equal(reference.to_dense(w), kept)
    assert torch.equal(w.t().to_dense(), kept.t())
    at = reference.decode(w)
    found = torch.zeros_like(mask)
    found[at.row, at.col] = True
    assert torch.equal(found, mask)
    others = [
        CSBMatrix.from_dense(kept.t().contiguous().t(), mask, **packing(weight.blocks)),
        CSBMatrix.from_coo(w.to_coo(), **packing(weight.blocks)),
        CSBMatrix.from_csr(w.to_csr(), **packing(weight.blocks)),
        CSBMatrix.from_arrays(w.values, w.codes, w.blk_ptr, w.blk_pad, m=w.m, k=w.k, layout=w.layout),
    ]
    for other in others:
        for name in ("values", "codes", "blk_ptr", "blk_pad", "units"):
            assert torch.equal(getattr(other, name), getattr(w, name)), name


@examples(150)
@given(
    weight=WEIGHT,
    n=COLUMNS,
    layout=st.sampled_from(("rows", "batched_rows", "row_gaps", "transposed")),
    bias=st.booleans(),
)
def test_a_linear_layer_and_its_gradients(device, weight, n, layout, bias):
    w = weight.matrix(device)
    x, dim = activation(layout, w.k, n, w.dtype, device)
    b = torch.randn(w.m).to(x) if bias else None
    layer = CSBLinear(w, b)
    x.requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape).to(y)
    y.backward(dy)
    judge = Judge(w)
    judge.product(y.detach(), x, b, None, dim, False)
    judge.product(x.grad, dy, None, None, dim, True)
    judge.sampled(layer.values.grad, dy, x, dim)
    if b is not None:
        columns = tuple(range(y.dim() - 1))
        within(layer.bias.grad, dy.double().sum(columns), dy.double().abs().sum(columns), n)
