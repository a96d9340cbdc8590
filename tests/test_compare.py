"""The judge must pass what is right and fail what is wrong, or no other test means anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_csb.testing import MATRICES, Expected, compare, matrix
from torch_csb.testing.compare import expected

M, K, N = 48, 320, 24


def product(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Expected]:
    """Sparse W, X, PyTorch's own product in dtype and what the judge expects of it."""
    mask = torch.rand(M, K) < 0.3
    w = (torch.randn(M, K) * mask).to(dtype)
    x = torch.randn(K, N).to(dtype)
    own = w @ x
    value = w.double() @ x.double()
    magnitude = w.double().abs() @ x.double().abs()
    return w, x, own, expected(value, magnitude, mask.sum(1, keepdim=True), own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_passes_pytorchs_own_result(dtype: torch.dtype) -> None:
    _, _, own, want = product(dtype)
    compare(own, want)


def test_passes_another_order_of_summation() -> None:
    w, x, _, want = product()
    order = torch.randperm(K)
    compare(w[:, order] @ x[order], want)


def test_passes_one_rounding_step() -> None:
    *_, want = product()
    y = want.value.float()
    compare(torch.nextafter(y, torch.full_like(y, torch.inf)), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_fails_one_element_off_by_a_hundredth(dtype: torch.dtype) -> None:
    _, _, own, want = product(dtype)
    own[7, 3] = want.value[7, 3] * 1.01
    with pytest.raises(AssertionError, match=r"case A: element \(7, 3\): expected .* got .* bound .*; 1 of 1152"):
        compare(own, want, "case A")


def test_fails_16_bit_accumulation() -> None:
    w, x, _, want = product(torch.float16)
    y = torch.zeros(M, N, dtype=torch.float16)
    for j in range(K):
        y += w[:, j : j + 1] * x[j]
    with pytest.raises(AssertionError, match="elements are over their bound"):
        compare(y, want)


def test_fails_tf32_as_float32() -> None:
    """Inputs cut to 10 mantissa bits. The second test must catch it without the first, which a long sum would pass."""
    w, x, _, want = product()
    y = _tf32(w) @ _tf32(x)
    with pytest.raises(AssertionError):
        compare(y, want)
    loose = Expected(want.value, want.bound * 1e6, want.relative, want.dtype)
    with pytest.raises(AssertionError, match=r"relative error .* \(twice PyTorch's own\)"):
        compare(y, loose)


def test_fails_bfloat16_as_float16() -> None:
    w, x, own, want = product(torch.float16)
    with pytest.raises(AssertionError):
        compare((w.bfloat16() @ x.bfloat16()).half(), want)


def _tf32(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_fails_a_wrong_zero() -> None:
    _, _, own, want = product()
    own[-1, -1] = 0
    with pytest.raises(AssertionError, match=r"element \(47, 23\)"):
        compare(own, want)


def test_fails_a_missing_zero() -> None:
    """A row without entries is exactly zero; nothing else is within its bound."""
    value = torch.zeros(3, 4, dtype=torch.float64)
    want = expected(value, value, 0, value.float())
    compare(torch.zeros(3, 4), want)
    y = torch.zeros(3, 4)
    y[1, 2] = 1e-30
    with pytest.raises(AssertionError, match=r"element \(1, 2\)"):
        compare(y, want)


def test_judges_nan_and_infinity() -> None:
    value = torch.tensor([1.0, torch.nan, torch.inf, 1e6], dtype=torch.float64)
    want = expected(value, value.abs(), 1, value.half())
    right = torch.tensor([1.0, torch.nan, torch.inf, torch.inf], dtype=torch.float16)
    compare(right, want)
    for i, wrong in enumerate((torch.nan, 1.0, -torch.inf, torch.nan)):
        y = right.clone()
        y[i] = wrong
        with pytest.raises(AssertionError, match=rf"element \({i},\)"):
            compare(y, want)


def test_fails_another_shape_or_dtype() -> None:
    _, _, own, want = product()
    with pytest.raises(AssertionError, match="expected torch.float32"):
        compare(own.double(), want)
    with pytest.raises(AssertionError, match=r"\(48, 24\), got"):
        compare(own.t(), want)


def test_named_matrices_are_what_their_names_say() -> None:
    assert len({case.name for case in MATRICES}) == len(MATRICES)
    for case in MATRICES:
        mask, dense = case.mask(), case.dense()
        assert mask.shape == dense.shape == (case.m, case.k) and case.reason
        if not case.explicit_zeros:
            assert torch.equal(dense != 0, mask), case
    assert not matrix("empty_block_row").mask()[256:].any()
    assert matrix("full").mask().all()
    assert matrix("one_dense_row").mask().sum() == 1024
    kept = matrix("explicit_zeros")
    assert ((kept.dense() == 0) & kept.mask()).any()
    for name, sparsity in (("uniform_50", 0.5), ("uniform_90", 0.9), ("uniform_99", 0.99)):
        assert abs(1 - matrix(name).mask().float().mean() - sparsity) < 0.01
    # Drawing twice gives the same weight: a failure can be repeated by its name.
    assert torch.equal(matrix("power_law_rows").dense(), matrix("power_law_rows").dense())
