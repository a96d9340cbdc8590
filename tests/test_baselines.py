"""The CSR baselines against the reference: a rival that is wrong or slow by mistake would flatter the blocks."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from baseline_cases import SPMM, check_all, shifted
from cases import DTYPES, build, random_matrix
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from torch_csb import CSBMatrix, baselines
from torch_csb.baselines import CSRMatrix
from torch_csb.testing import MATRICES, NamedMatrix, matrix

OPS = torch.ops.torch_csb
COLUMNS = (0, 1, 3, 8, 33, 64, 130, 257)
ARRAYS = ("values", "row_ptr", "col_ind", "row_order")


def arrays(w: CSRMatrix) -> list[Tensor]:
    return [getattr(w, name) for name in ARRAYS]


def random_csr(
    m: int, k: int, sparsity: float = 0.5, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> CSRMatrix:
    return CSRMatrix.from_csb(random_matrix(m, k, sparsity, dtype, device))


# --- the products -----------------------------------------------------------------------------------------------------

_columns = cycle(COLUMNS[1:])


@pytest.mark.parametrize(
    ("case", "n"),
    # Every matrix with two column counts, which rotate.
    [(case, next(_columns)) for case in MATRICES for _ in range(2)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_matrices(case: NamedMatrix, n: int, dtype: torch.dtype, device: str) -> None:
    check_all(build(case, dtype, device), n)


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_counts(dtype: torch.dtype, n: int, misaligned: bool, device: str) -> None:
    check_all(build(matrix("uniform_90"), dtype, device), n, misaligned)


@pytest.mark.parametrize("name", ["full", "one_dense_row", "edge_65x63", "explicit_zeros"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_arrays(dtype: torch.dtype, name: str, device: str) -> None:
    for n in (1, 8, 36, 64):
        check_all(build(matrix(name), dtype, device), n, misaligned=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_length(dtype: torch.dtype, device: str) -> None:
    """Row i holds i entries: no chunk of entries fits them all."""
    m = k = 140
    place = torch.rand(m, k).argsort(1)
    weight = torch.randn(m, k).clamp_min(0.1) * (place < torch.arange(m)[:, None])
    w = CSBMatrix.from_dense(weight.to(device=device, dtype=dtype))
    for n in (1, 8, 33, 64, 130):
        check_all(w, n)


def test_columns_beyond_16_bits(device: str) -> None:
    """Column indices stay 32-bit, also beside 16-bit values."""
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.randn(6, 70_000) * (torch.rand(6, 70_000) < 0.01)
        weight[3, -1] = weight[4, 40_000] = 1
        check_all(CSBMatrix.from_dense(weight.to(device=device, dtype=dtype)), 9)


def test_one_row_longer_than_all_others_together(device: str) -> None:
    weight = torch.randn(200, 5000) * (torch.rand(200, 5000) < 0.002)
    weight[100] = torch.randn(5000)
    for dtype in (torch.float32, torch.bfloat16):
        check_all(CSBMatrix.from_dense(weight.to(device=device, dtype=dtype)), 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_results(dtype: torch.dtype, device: str) -> None:
    """W times the identity is W, and small integers have no rounding: not a bit may differ."""
    weight = matrix("uniform_90").dense(dtype, device)
    eye = torch.eye(weight.shape[1], dtype=dtype, device=device)
    digits = weight.double().round().to(dtype)
    w, z = CSRMatrix.from_dense(weight), CSRMatrix.from_dense(digits)
    x = torch.randint(-3, 4, (z.k, 37)).to(digits)
    y = torch.randint(-3, 4, (z.m, 37)).to(digits)
    for multiply in SPMM[device]:
        assert torch.equal(multiply(w, eye), weight), multiply.__name__
        assert torch.equal(multiply(z, x), (digits.double() @ x.double()).to(dtype)), multiply.__name__
        assert torch.equal(multiply(z.t(), y), (digits.double().t() @ y.double()).to(dtype)), multiply.__name__
    sampled = (y.double() @ x.double().t())[digits != 0]
    assert torch.equal(baselines.sddmm(z, y, x), sampled.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_written(dtype: torch.dtype, device: str) -> None:
    """Subnormals, infinities and NaN too, as PyTorch converts them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)
    numbers = bits.view(dtype).view(1, -1)
    one = CSRMatrix.from_dense(torch.ones(1, 1, dtype=dtype, device=device))
    for multiply in SPMM[device]:
        got = multiply(one, numbers)
        assert torch.equal(got.isnan(), numbers.isnan())
        assert torch.equal(got.nan_to_num(0), numbers.nan_to_num(0)), multiply.__name__
    index = torch.arange(2**16 + 1, dtype=torch.int32, device=device)
    diagonal = CSRMatrix(numbers.flatten(), index, index[:-1], m=2**16, k=2**16)
    factors = torch.randn(2**16, 1).to(numbers)
    products = (factors.float() * numbers.float().t()).to(dtype).flatten()
    got = baselines.sddmm(diagonal, factors, numbers.t().contiguous())
    torch.testing.assert_close(got, products, rtol=0, atol=0, equal_nan=True)


def test_nothing_of_other_columns_is_read(device: str) -> None:
    """A NaN in one column of X stays in that column, whatever tile it shares; one in W stays in its row."""
    weight = matrix("edge_65x63").dense(device=device)
    w = CSRMatrix.from_dense(weight)
    weight[5, weight[5].nonzero()[0]] = torch.nan
    broken = CSRMatrix.from_dense(weight)
    for n in (2, 9, 70):
        x = torch.randn(w.k, n, device=device)
        for multiply in SPMM[device]:
            clean = multiply(w, x)
            y = multiply(broken, x)
            others = torch.arange(w.m, device=device) != 5
            assert y[5].isnan().all() and torch.equal(y[others], clean[others]), multiply.__name__
            spoilt = x.clone()
            spoilt[:, 1] = torch.nan
            keep = torch.arange(n, device=device) != 1
            assert torch.equal(multiply(w, spoilt)[:, keep], clean[:, keep]), multiply.__name__


def _bits(w: CSRMatrix, x: Tensor, y: Tensor, device: str) -> list[Tensor]:
    return [multiply(w, x) for multiply in SPMM[device]] + [baselines.sddmm(w, y, x)]


@pytest.mark.parametrize("n", [1, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_every_run(dtype: torch.dtype, n: int, device: str) -> None:
    w = random_csr(500, 1000, 0.7, dtype, device)
    x, y = torch.randn(w.k, n).to(w.values), torch.randn(w.m, n).to(w.values)
    first = _bits(w, x, y, device)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(_bits(w, x, y, device), first, strict=True))


def test_same_bits_with_any_number_of_threads() -> None:
    """And every row is written once, however the entries are shared out."""
    w = random_csr(300, 2000, 0.8)
    x, y = torch.randn(w.k, 65), torch.randn(w.m, 65)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(_bits(w, x, y, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_conversions(case: NamedMatrix, device: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        dense, csb = case.dense(dtype, device), build(case, dtype, device)
        w, same = CSRMatrix.from_dense(dense), CSRMatrix.from_csb(csb)
        assert same.nnz == csb.nnz and w.nnz == int((dense != 0).sum())
        assert w.shape == same.shape == dense.shape and w.device == dense.device and w.dtype == dtype
        for kept in (w, same):
            assert torch.equal(kept.to_dense(), dense)
            assert torch.equal(kept.t().to_dense(), dense.t())
            assert all(torch.equal(a, b) for a, b in zip(arrays(kept.t().t()), arrays(kept), strict=True))
        if not case.explicit_zeros:
            assert all(torch.equal(a, b) for a, b in zip(arrays(w), arrays(same), strict=True))
        assert torch.equal(CSRMatrix.from_csb(csb.t()).to_dense(), dense.t())


def test_matrix_of_strided_memory_and_of_nan(device: str) -> None:
    dense = torch.tensor([[0.0, -0.0, 1.0], [torch.nan, 0.0, 2.0], [3.0, torch.inf, 0.0]], device=device)
    w = CSRMatrix.from_dense(dense.t().requires_grad_())
    assert w.nnz == 5 and not w.values.requires_grad
    torch.testing.assert_close(w.to_dense(), dense.t().detach(), rtol=0, atol=0, equal_nan=True)


def test_rows_stand_longest_first_and_equal_ones_in_order(device: str) -> None:
    dense = torch.zeros(5, 4, device=device)
    for row, length in enumerate((1, 3, 0, 3, 1)):
        dense[row, :length] = 1
    w = CSRMatrix.from_dense(dense)
    assert w.row_order.tolist() == [1, 3, 0, 4, 2]
    assert w.row_ptr.tolist() == [0, 1, 4, 4, 7, 8]
    assert w.nbytes == 8 * 4 + 8 * 4 + 6 * 4 + 5 * 4


def test_clone_shares_nothing(device: str) -> None:
    w = random_csr(20, 30, device=device)
    other = w.clone()
    for mine, theirs in zip(arrays(w), arrays(other), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
    assert other.shape == w.shape and repr(other) == repr(w)


def _refuse(match: str, **changes: object) -> None:
    """Of the matrix [[1, 2, 0], [0, 0, 3]] with other arrays."""
    good = {
        "values": torch.tensor([1.0, 2.0, 3.0]),
        "row_ptr": torch.tensor([0, 2, 3], dtype=torch.int32),
        "col_ind": torch.tensor([0, 1, 2], dtype=torch.int32),
        "row_order": torch.tensor([0, 1], dtype=torch.int32),
        "m": 2,
        "k": 3,
    }
    CSRMatrix(**good)
    with pytest.raises(ValueError, match=match):
        CSRMatrix(**(good | changes))


def test_refuses_bad_arrays() -> None:
    def index(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    _refuse("values: expected dtype float64, .* got torch.int64", values=torch.tensor([1, 2, 3]))
    _refuse("values: expected a contiguous 1-D tensor", values=torch.ones(3, 1))
    _refuse("values: expected a contiguous 1-D tensor", values=torch.ones(6)[::2])
    _refuse("m: expected a size from 0 .* got -1", m=-1)
    _refuse("k: expected a size from 0 .* got 4294967296", k=2**32)
    _refuse("row_ptr: expected dtype int32, got torch.int64", row_ptr=torch.tensor([0, 2, 3]))
    _refuse("row_ptr: expected 3 contiguous elements", row_ptr=index(0, 3))
    _refuse("row_ptr: expected to run from 0 to 3, got 1 to 3", row_ptr=index(1, 2, 3))
    _refuse("row_ptr: expected to run from 0 to 3, got 0 to 2", row_ptr=index(0, 2, 2))
    _refuse("row_ptr: expected a monotone prefix, it falls after row 1", row_ptr=index(0, 4, 3))
    _refuse("row_ptr: expected a monotone prefix", row_ptr=index(0, -(2**31), 3))
    _refuse("col_ind: expected dtype int32", col_ind=torch.tensor([0, 1, 2]))
    _refuse("col_ind: expected 3 contiguous elements", col_ind=index(0, 1))
    _refuse("col_ind: expected columns from 0 to 2, got 0 to 3", col_ind=index(0, 1, 3))
    _refuse("col_ind: expected columns from 0 to 2, got -1 to 2", col_ind=index(-1, 1, 2))
    _refuse("col_ind: expected ascending columns, got 0 after 1 at entry 1 of row 0", col_ind=index(1, 0, 2))
    _refuse("col_ind: expected ascending columns, got 1 after 1", col_ind=index(1, 1, 2))
    _refuse("row_order: expected 2 contiguous elements", row_order=index(0, 1, 2))
    _refuse("row_order: expected dtype int32", row_order=torch.tensor([0, 1]))
    _refuse("row_order: expected every row once", row_order=index(0, 0))
    _refuse("row_order: expected every row once", row_order=index(0, 2))
    _refuse("row_order: expected the longest rows first", row_order=index(1, 0))
    _refuse("col_ind: expected a tensor on cpu like values, got one on meta", col_ind=index(0, 1, 2).to("meta"))
    with pytest.raises(ValueError, match=r"dense: expected a matrix, got shape \(3,\)"):
        CSRMatrix.from_dense(torch.ones(3))
    with pytest.raises(ValueError, match="values: expected dtype float64"):
        CSRMatrix.from_dense(torch.ones(3, 3, dtype=torch.int32))


# --- what is refused --------------------------------------------------------------------------------------------------


def raises(match: str):
    return pytest.raises((RuntimeError, ValueError), match=match)


def test_refuses_wrong_operands(device: str) -> None:
    w = random_csr(20, 30, device=device)
    x, y = torch.randn(30, 4, device=device), torch.randn(20, 4, device=device)
    for multiply in SPMM[device]:
        with raises("x: expected dtype float32, got float64"):
            multiply(w, x.double())
        with raises(r"x: expected shape \[30, n\], got \[20, 4\]"):
            multiply(w, y)
        with raises(r"x: expected shape \[30, n\], got \[30\]"):
            multiply(w, x[:, 0])
        with raises(r"x: expected a contiguous matrix, got shape \[30, 4\] and strides \[1, 30\]"):
            multiply(w, x.t().contiguous().t())
        with raises("x: expected a contiguous matrix"):
            multiply(w, torch.randn(30, 8, device=device)[:, ::2])
    with raises("b: expected dtype float32, got float16"):
        baselines.sddmm(w, y, x.half())
    with raises("a: expected dtype float64, float32, bfloat16 or float16, got int64"):
        baselines.sddmm(w, y.long(), x.long())
    with raises(r"a: expected 20 rows, got shape \[30, 4\]"):
        baselines.sddmm(w, x, x)
    with raises(r"b: expected shape \[30, n\], got \[20, 4\]"):
        baselines.sddmm(w, y, y)
    with raises(r"b: expected 4 columns like a, got shape \[30, 3\]"):
        baselines.sddmm(w, y, x[:, :3].contiguous())
    with raises("a: expected a contiguous matrix"):
        baselines.sddmm(w, y[:, :2], x[:, :2])


def _multiplications(device: str) -> list:
    names = ("csr_row_split",) if device == "cpu" else ("csr_row_split", "csr_merge", "csr_row_swizzle")
    return [getattr(OPS, name).default for name in names]


def test_refuses_arrays_that_do_not_fit(device: str) -> None:
    """The operators themselves: no index array may be shorter than what a kernel reads."""
    w = random_csr(20, 30, device=device)
    x = torch.randn(30, 4, device=device)
    changes = {
        "values: expected dtype float64, .* got int32": {"values": w.values.int()},
        "values: expected .* elements, got": {"values": w.values[:-1]},
        "values: expected a contiguous 1-D tensor": {"values": w.values[:, None]},
        "row_ptr: expected dtype int32, got int64": {"row_ptr": w.row_ptr.long()},
        r"row_ptr: expected a contiguous 1-D tensor, got shape \[1, 21\]": {"row_ptr": w.row_ptr[None]},
        r"row_ptr: expected m \+ 1 elements, got 0": {"row_ptr": w.row_ptr[:0]},
        "col_ind: expected dtype int32, got int64": {"col_ind": w.col_ind.long()},
        "col_ind: expected a contiguous 1-D tensor": {"col_ind": w.col_ind[::2]},
        "row_order: expected dtype int32, got uint8": {"row_order": w.row_order.byte()},
        "row_order: expected 20 elements, got 19": {"row_order": w.row_order[1:]},
        "row_order: expected 19 elements, got 20": {"row_ptr": w.row_ptr[:-1]},
    }
    good = dict(zip(ARRAYS, arrays(w), strict=True))
    for op in _multiplications(device):
        for message, change in changes.items():
            with raises(message):
                op(*(good | change).values(), x)
        with raises(r"x: expected a contiguous matrix, got shape \[30\]"):
            op(*good.values(), x[:, 0].contiguous())
    index = arrays(w)[1:]
    with raises("row_ptr: expected dtype int32, got int64"):
        OPS.csr_sddmm(index[0].long(), *index[1:], torch.randn(20, 4, device=device), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_refuses_tensors_on_different_devices() -> None:
    w = random_csr(20, 30, device="cuda")
    for multiply in SPMM["cuda"]:
        with raises("expected a tensor on cpu like x, got one on cuda:0"):
            multiply(w, torch.randn(30, 4))
    with raises("b: expected a tensor on cuda:0 like a, got one on cpu"):
        baselines.sddmm(w, torch.randn(20, 4, device="cuda"), torch.randn(30, 4))
    with raises("row_order: expected a tensor on cuda:0 like x, got one on cpu"):
        OPS.csr_row_split(w.values, w.row_ptr, w.col_ind, w.row_order.cpu(), torch.randn(30, 4, device="cuda"))


def test_refuses_other_devices() -> None:
    w = random_csr(20, 30)
    with raises("values: expected a tensor on meta like x, got one on cpu"):
        baselines.row_split(w, torch.randn(30, 4, device="meta"))


def test_what_needs_a_gpu_says_so() -> None:
    w, x = random_csr(20, 30), torch.randn(30, 4)
    with raises("merge: expected a matrix on CUDA, got one on cpu"):
        baselines.merge(w, x)
    with raises("row_swizzle: expected a matrix on CUDA, got one on cpu"):
        baselines.row_swizzle(w, x)


def test_no_derivative_is_an_error(device: str) -> None:
    w = random_csr(20, 30, device=device)
    x, y = torch.randn(30, 4, device=device), torch.randn(20, 4, device=device)
    for multiply in SPMM[device]:
        with raises("the baselines have no derivative"):
            multiply(w, x.clone().requires_grad_())
    with raises("the baselines have no derivative"):
        baselines.sddmm(w, y.clone().requires_grad_(), x)
    with torch.no_grad():
        baselines.row_split(w, x.clone().requires_grad_())
    w.values.requires_grad_()
    with raises("the baselines have no derivative"):
        baselines.row_split(w, x)


# --- what torch is told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 6])
def test_opcheck(n: int, device: str) -> None:
    w = random_csr(20, 30, device=device)
    x, y = torch.randn(30, n, device=device), torch.randn(20, n, device=device)
    for op in _multiplications(device):
        torch.library.opcheck(op, (*arrays(w), x))
    torch.library.opcheck(OPS.csr_sddmm.default, (*arrays(w)[1:], y, x))


@pytest.mark.parametrize(("m", "k", "n"), [(20, 30, 6), (0, 30, 6), (20, 0, 6), (20, 30, 0), (0, 0, 0)])
def test_fakes(m: int, k: int, n: int, device: str) -> None:
    w = random_csr(m, k, dtype=torch.bfloat16, device=device)
    x, y = torch.randn(k, n).to(w.values), torch.randn(m, n).to(w.values)
    calls = [(op, (*arrays(w), x)) for op in _multiplications(device)]
    for op, args in [*calls, (OPS.csr_sddmm.default, (*arrays(w)[1:], y, x))]:
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*map(mode.from_tensor, args))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype), op
        assert fake.device.type == device


def test_flop_counter(device: str) -> None:
    """Two operations for each entry and column."""
    w = random_csr(20, 30, device=device)
    x, y = torch.randn(30, 6, device=device), torch.randn(20, 6, device=device)
    for run in [*(lambda f=f: f(w, x) for f in SPMM[device]), lambda: baselines.sddmm(w, y, x)]:
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == 2 * w.nnz * 6


def test_operators_are_functional() -> None:
    for name in ("csr_row_split", "csr_merge", "csr_row_swizzle", "csr_sddmm"):
        schema = getattr(OPS, name).default._schema
        assert not schema.is_mutable, name
        assert all(result.alias_info is None for result in schema.returns), name


def test_shifted_tensors_are_what_the_tests_mean() -> None:
    x = shifted(torch.randn(5, 4))
    assert x.is_contiguous() and x.data_ptr() % 16 == 4
