"""spmm, spmm_t and sddmm against the reference."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from cases import (
    ACTIVATIONS,
    BLOCK_SIZES,
    BLOCKS,
    DTYPES,
    LAYOUTS,
    build,
    call,
    call_sddmm,
    check_all,
    packing,
    random_matrix,
)
from torch import Tensor

from torch_csb import CSBMatrix, ops, reference
from torch_csb.testing import MATRICES, NamedMatrix, matrix, read_smtx

# 0 columns, a matrix-vector product, a vector register and a tile with one less and one more, several tiles.
COLUMNS = (0, 1, 2, 3, 7, 8, 9, 33, 64, 65, 130, 257)


_columns = cycle(COLUMNS[1:])
_layouts = cycle(LAYOUTS)


@pytest.mark.parametrize(
    ("case", "blocks", "n", "layout"),
    # Every matrix with every kind of blocks; column counts and layouts rotate through the pairs.
    [(case, blocks, next(_columns), next(_layouts)) for case in MATRICES for blocks in BLOCK_SIZES]
    + [(case, "bitmap", next(_columns), next(_layouts)) for case in MATRICES],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_matrices(
    case: NamedMatrix, blocks: int | str, n: int, layout: str, dtype: torch.dtype, device: str
) -> None:
    check_all(build(case, dtype, device, blocks), layout, n, bias=True)


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("layout", ["rows", "columns", "nchw"])
@pytest.mark.parametrize("blocks", [16, 64, 256, "bitmap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_counts(dtype: torch.dtype, blocks: int | str, layout: str, n: int, device: str) -> None:
    check_all(build(matrix("uniform_90"), dtype, device, blocks), layout, n)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [24, 130])
@pytest.mark.parametrize("blocks", [32, 64, 128, "bitmap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layouts(dtype: torch.dtype, blocks: int | str, n: int, layout: str, device: str) -> None:
    check_all(build(matrix("edge_65x63"), dtype, device, blocks), layout, n)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["rows", "nchw"])
@pytest.mark.parametrize("n", [1, 9, 64])
@pytest.mark.parametrize("name", ["empty", "70x0", "empty_block_row", "uniform_50"])
def test_epilogues(name: str, n: int, layout: str, bias: bool, act: str | None, device: str) -> None:
    """Also where a strip has no entry: bias and act(0) must be written there too."""
    for dtype in DTYPES:
        for blocks in (64, "bitmap"):
            check_all(build(matrix(name), dtype, device, blocks), layout, n, bias, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("n", [1, 8, 33, 300])
def test_strips_shared_by_several_units(n: int, blocks: int | str, dtype: torch.dtype, device: str) -> None:
    """Few strips and many entries: units must share strips, whose parts are joined."""
    for m, k in ((96, 2048), (2048, 96), (590, 760)):
        w = random_matrix(m, k, 0.6, dtype, device, blocks)
        block_rows, block_columns = -(-m // w.block_size), -(-k // w.block_size)
        shared = [w.units[0, 1:-1] % block_columns != 0, w.units[1, 1:-1] % block_rows != 0]
        assert torch.cat(shared).any() or blocks == 256 and m == 590, "every unit begins with a strip"
        check_all(w, "rows", n, bias=True, act="relu")


@pytest.mark.parametrize("name", ["identity", "uniform_90"])
def test_exact_results(name: str, device: str) -> None:
    """Small integers have no rounding: not a bit may differ, in any dtype."""
    case = matrix(name)
    for dtype in DTYPES:
        weight = (case.mask().double() if name == "identity" else case.dense(torch.float64).round()).to(device, dtype)
        for blocks in BLOCKS:
            w = CSBMatrix.from_dense(weight, **packing(blocks))
            x = torch.randint(-3, 4, (17, w.k)).to(device, dtype)
            y = torch.randint(-3, 4, (17, w.m)).to(device, dtype)
            assert torch.equal(ops.spmm(w, x), (x.double() @ weight.double().t()).to(dtype))
            assert torch.equal(ops.spmm_t(w, y), (y.double() @ weight.double()).to(dtype))
            assert torch.equal(ops.sddmm(w, y, x), reference.sddmm(w, y.double(), x.double()).to(dtype))


def test_vectors_and_matmul(device: str) -> None:
    w = build(matrix("uniform_90"), torch.float64, device)
    dense = w.to_dense()
    x, y = torch.randn(w.k).to(dense), torch.randn(w.m).to(dense)
    xs = torch.randn(w.k, 5).to(dense)
    torch.testing.assert_close(ops.spmm(w, x), dense @ x)
    torch.testing.assert_close(ops.spmm_t(w, y), dense.t() @ y)
    torch.testing.assert_close(reference.to_dense(w.with_values(ops.sddmm(w, y, x))), torch.outer(y, x) * (dense != 0))
    torch.testing.assert_close(w @ x, dense @ x)
    torch.testing.assert_close(w @ xs, dense @ xs)
    torch.testing.assert_close(w.t() @ y, dense.t() @ y)
    assert torch.equal(ops.spmm(w.t(), y), ops.spmm_t(w, y))
    assert torch.equal(ops.spmm_t(w.t(), x), ops.spmm(w, x))
    assert torch.equal(ops.sddmm(w.t(), x, y), ops.sddmm(w, y, x))


def test_linear_and_conv2d(device: str) -> None:
    w = random_matrix(70, 50, 0.7, torch.float64, device)
    dense, bias = w.to_dense(), torch.randn(70, dtype=torch.float64, device=device)
    x = torch.randn(3, 4, 50, dtype=torch.float64, device=device)
    torch.testing.assert_close(ops.linear(x, w, bias), torch.nn.functional.linear(x, dense, bias))
    image = torch.randn(2, 50, 7, 6, dtype=torch.float64, device=device)
    kernel = dense[:, :, None, None]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for stride in (1, 2, (3, 1)):
            given = image.to(memory_format=memory_format)
            got = ops.conv2d(given, w, bias, stride=stride)
            torch.testing.assert_close(got, torch.nn.functional.conv2d(given, kernel, bias, stride))
            assert got.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(ops.conv2d(image[0], w), torch.nn.functional.conv2d(image[0], kernel))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype: torch.dtype, device: str) -> None:
    """Both arrive where their entry says. A zero that isn't stored may or may not meet them, so W is full."""
    weight = torch.ones(65, 64, dtype=dtype, device=device)
    weight[3, 5], weight[4, 6] = torch.nan, torch.inf
    w = CSBMatrix.from_dense(weight)
    for n in (1, 8, 40):
        x = torch.ones(n, 64, dtype=dtype, device=device)
        for act in (None, "relu", "relu6"):
            y = ops.spmm(w, x, activation=act)
            assert y[:, 3].isnan().all(), f"{act}(NaN) must stay NaN"
            assert (y[:, 4] == (6 if act == "relu6" else torch.inf)).all()
            assert y[:, [0, 1, 2, 64]].isfinite().all()
        y = ops.spmm_t(w, torch.ones(n, 65, dtype=dtype, device=device))
        assert y[:, 5].isnan().all() and y[:, 6].isinf().all() and y[:, 7:].isfinite().all()


def test_nothing_of_other_rows_or_columns_is_read(device: str) -> None:
    """A NaN in one column of the activations stays in that column, whatever tile it shares."""
    w = build(matrix("edge_65x63"), torch.float32, device)
    for n in (2, 9, 70):
        x = torch.randn(n, w.k, device=device)
        clean = ops.spmm(w, x)
        x[1] = torch.nan
        y = ops.spmm(w, x)
        keep = torch.arange(n, device=device) != 1
        assert torch.equal(y[keep], clean[keep])


def _bits(w: CSBMatrix, x: Tensor, y: Tensor) -> list[Tensor]:
    return [ops.spmm(w, x), ops.spmm_t(w, y), ops.sddmm(w, y, x)]


@pytest.mark.parametrize("n", [1, 8, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_every_run(dtype: torch.dtype, n: int, device: str) -> None:
    w = random_matrix(520, 1300, 0.7, dtype, device)
    x, y = torch.randn(n, w.k).to(w.values), torch.randn(n, w.m).to(w.values)
    first = _bits(w, x, y)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(_bits(w, x, y), first, strict=True))


@pytest.mark.parametrize("n", [1, 8, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype, n: int) -> None:
    w = random_matrix(520, 1300, 0.7, dtype)
    x, y = torch.randn(n, w.k).to(dtype), torch.randn(n, w.m).to(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_bits(w, x, y))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_dlmc_patterns(dlmc: list, device: str) -> None:
    for path in dlmc[:: max(len(dlmc) // 8, 1)]:
        mask = read_smtx(path)
        w = CSBMatrix.from_dense((torch.randn(mask.shape) * mask).to(device), mask.to(device))
        check_all(w, "columns", 33)


# --- what is refused --------------------------------------------------------------------------------------------------


def raises(match: str):
    return pytest.raises((RuntimeError, ValueError), match=match)


@pytest.mark.parametrize("name", ["spmm", "spmm_t"])
def test_refuses_wrong_operands(name: str, device: str) -> None:
    w = random_matrix(60, 60, 0.5, device=device)
    x = torch.randn(4, 60, device=device)
    bias = torch.randn(60, device=device)
    with raises("x: expected dtype float32, got float64"):
        call(name, w, x.double())
    with raises("x: expected dtype float32, got int64"):
        call(name, w, x.long())
    with raises(r"x: expected 60 features in dimension 1, got shape \[4, 59\]"):
        call(name, w, x[:, :59])
    with raises(r"x: expected 60 features in dimension 0, got shape \[4, 60\]"):
        call(name, w, x, dim=0)
    with raises("dim: expected .* got 2"):
        call(name, w, x, dim=2)
    with raises("dim: expected .* got -3"):
        call(name, w, x, dim=-3)
    with raises("dim: expected"):
        call(name, w, x[0, 0])
    with raises("bias: expected 60 elements, got 59"):
        call(name, w, x, bias[:59])
    with raises("bias: expected dtype float32, got float16"):
        call(name, w, x, bias.half())
    with raises("bias: expected a contiguous 1-D tensor"):
        call(name, w, x, bias[None])
    with raises("activation: expected 0 to 4, got 5"):
        call(name, w, x, activation=5)
    with raises("activation: expected None, 'relu', .* got 'tanh'"):
        ops.spmm(w, x, activation="tanh")


def test_refuses_sddmm_operands(device: str) -> None:
    w = random_matrix(60, 50, 0.5, device=device)
    a, b = torch.randn(4, 60, device=device), torch.randn(4, 50, device=device)
    with raises("b: expected dtype float32, got float64"):
        call_sddmm(w, a, b.double())
    with raises("a: expected 60 features in dimension 1"):
        call_sddmm(w, b, b)
    with raises("b: expected 50 features in dimension 1"):
        call_sddmm(w, a, a)
    with raises(r"b: expected the sizes of a outside dimension 1, \[4, 60\], got \[3, 50\]"):
        call_sddmm(w, a, b[:3])
    with raises("a: expected dtype float64, float32, bfloat16 or float16, got int64"):
        call_sddmm(w, a.long(), b.long())


def test_refuses_arrays_that_do_not_fit(device: str) -> None:
    w = random_matrix(60, 60, 0.5, device=device)
    x = torch.randn(4, 60, device=device)
    index = (w.codes, w.blk_ptr, w.blk_pad, w.units)
    op = torch.ops.torch_csb.spmm

    with raises(r"codes: expected dtype uint8 \(codes\) or int64 \(a bitmap\), got int32"):
        op(w.values, w.codes.int(), *index[1:], x, None, 60, 60, 64, -1, 0)
    with raises("blk_ptr: expected dtype int32, got int64"):
        op(w.values, w.codes, w.blk_ptr.long(), *index[2:], x, None, 60, 60, 64, -1, 0)
    with raises("blk_ptr: expected 5 elements, got 2"):
        op(w.values, *index, torch.randn(4, 100, device=device), None, 100, 100, 64, -1, 0)
    with raises("values: expected .* elements"):
        op(w.values[:-1], *index, x, None, 60, 60, 64, -1, 0)
    with raises(r"units: expected a contiguous \[2, num_units \+ 1\] tensor"):
        op(w.values, *index[:3], w.units[0], x, None, 60, 60, 64, -1, 0)
    with raises("m, k: expected sizes from 0 .* got -60"):
        op(w.values, *index, x, None, -60, 60, 64, -1, 0)
    with raises("m, k: expected sizes from 0 .* and -60"):
        op(w.values, *index, x, None, 60, -60, 64, -1, 0)
    with raises("block_size: expected a power of two from 2 to 256, got 48"):
        op(w.values, *index, x, None, 60, 60, 48, -1, 0)


def test_refuses_bitmaps_that_do_not_fit(device: str) -> None:
    w = random_matrix(60, 60, 0.5, device=device, block_size="bitmap")
    x = torch.randn(4, 60, device=device)
    index, sizes = (w.blk_ptr, w.blk_pad, w.units), (60, 60, 64)
    op, to_codes = torch.ops.torch_csb.spmm, torch.ops.torch_csb.to_codes
    with raises("codes: expected 64 elements, got 63"):
        op(w.values, w.codes[:-1], *index, x, None, *sizes, -1, 0)
    with raises("codes: expected a contiguous 1-D tensor"):
        op(w.values, w.codes[:, None], *index, x, None, *sizes, -1, 0)
    with raises("block_size: expected 64 with a bitmap, got 128"):
        op(w.values, w.codes, *index, x, None, 60, 60, 128, -1, 0)
    with raises("values: expected a contiguous 1-D tensor"):
        op(w.values[::2], w.codes, *index, x, None, *sizes, -1, 0)
    with raises("bitmap: expected dtype int64, got uint8"):
        to_codes(w.blk_pad, *index[:2], 60, 60, w.values.numel())
    with raises("stored: expected 0 to .* got -1"):
        torch.ops.torch_csb.sddmm(w.codes, *index, x, x, *sizes, -1, -1)
    if device == "cpu":  # elsewhere blk_ptr is trusted
        with raises("blk_ptr: expected to end at 1 stored entries, got"):
            op(w.values[:1], w.codes, *index, x, None, *sizes, -1, 0)


def test_refuses_another_number_of_stored_entries_than_codes_tell(device: str) -> None:
    w = random_matrix(60, 60, 0.5, device=device)
    a = torch.randn(4, 60, device=device)
    with raises(f"stored: expected {w.values.numel()} entries as codes has, got 8"):
        torch.ops.torch_csb.sddmm(w.codes, w.blk_ptr, w.blk_pad, w.units, a, a, 60, 60, 64, 8, -1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_refuses_tensors_on_different_devices() -> None:
    w, x = random_matrix(60, 60, 0.5, device="cuda"), torch.randn(4, 60)
    with raises("expected a tensor on cpu like x, got one on cuda:0"):
        call("spmm", w, x)
    with raises("bias: expected a tensor on cuda:0 like x, got one on cpu"):
        call("spmm", w, x.cuda(), torch.randn(60))
    with raises("b: expected a tensor on cuda:0 like a, got one on cpu"):
        call_sddmm(w, x.cuda(), x)


def test_refuses_other_devices() -> None:
    """Any device without a kernel of ours gives an error, not a wrong answer; meta stands for all of them."""
    w = random_matrix(60, 60, 0.5)
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        ops.spmm(w, torch.randn(4, 60, device="meta"))


@pytest.mark.parametrize("m, k, n", [(0, 20, 16), (20, 0, 16), (0, 0, 16), (20, 30, 0)])
def test_an_empty_input_of_many_column_levels_is_an_answer(device, m, k, n):
    """It counts as contiguous whatever its strides, so making it contiguous changes nothing."""
    check_all(random_matrix(m, k, 0.5, device=device), "four_levels", n, bias=True, act="relu")
