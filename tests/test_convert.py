"""From and to dense, CSR, COO and SciPy matrices and files of the Deep Learning Matrix Collection."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import DTYPES, build

from torch_csb import CSBMatrix
from torch_csb.testing import matrix, read_smtx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["0x0", "70x0", "empty", "full", "power_law_rows", "edge_255x257", "one_dense_row"])
def test_round_trips(name: str, dtype: torch.dtype, device: str) -> None:
    dense = matrix(name).dense(dtype, device)
    w = CSBMatrix.from_dense(dense)
    csr, coo = w.to_csr(), w.to_coo()
    assert csr.layout == torch.sparse_csr and coo.layout == torch.sparse_coo
    scipy_array = w.to_scipy()
    assert np.array_equal(
        scipy_array.toarray(), dense.cpu().to(torch.float32 if dtype.itemsize == 2 else dtype).numpy()
    )
    kept = {"block_size": w.block_size, "encoding": w.layout.encoding}  # SciPy's float32 would have codes
    for again in (
        CSBMatrix.from_csr(csr, **kept),
        CSBMatrix.from_coo(coo, **kept),
        CSBMatrix.from_scipy(scipy_array, **kept),
    ):
        assert torch.equal(again.codes.cpu(), w.codes.cpu())
        assert torch.equal(again.blk_ptr.cpu(), w.blk_ptr.cpu()) and torch.equal(again.blk_pad.cpu(), w.blk_pad.cpu())
        assert torch.equal(again.values.cpu().to(dtype), w.values.cpu())
        again.validate()
    assert torch.equal(w.to_dense(), dense)


def test_coo_with_duplicates_in_any_order_is_added_up() -> None:
    index = torch.tensor([[3, 0, 3, 1], [2, 1, 2, 0]])
    w = CSBMatrix.from_coo(torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0, 4.0, 8.0]), (5, 4)), block_size=2)
    w.validate()
    assert w.nnz == 3
    assert w.to_dense()[3, 2] == 5.0


def test_mask_keeps_zeros(device: str) -> None:
    case = matrix("explicit_zeros")
    w = build(case, device=device)
    assert w.nnz == int(case.mask().sum()) > int((case.dense() != 0).sum())
    assert w.to_csr().values().numel() == w.nnz
    assert CSBMatrix.from_csr(w.to_csr()).nnz == w.nnz
    assert CSBMatrix.from_scipy(w.to_scipy()).nnz == w.nnz
    assert CSBMatrix.from_dense(w.to_dense()).nnz == int((case.dense() != 0).sum())


def test_mask_drops_what_it_does_not_name() -> None:
    weight = torch.randn(70, 90)
    mask = torch.rand(70, 90) < 0.3
    assert torch.equal(CSBMatrix.from_dense(weight, mask).to_dense(), weight * mask)


def test_nan_is_an_entry_and_negative_zero_is_none() -> None:
    weight = torch.zeros(20, 20)
    weight[3, 4], weight[5, 6] = torch.nan, -0.0
    w = CSBMatrix.from_dense(weight)
    assert w.nnz == 1 and w.to_dense()[3, 4].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_weights(dtype: torch.dtype, device: str) -> None:
    weight = (torch.randn(130, 70) * (torch.rand(130, 70) < 0.3)).to(device=device, dtype=dtype)
    mask = torch.rand(70, 130, device=device) < 0.5
    assert torch.equal(CSBMatrix.from_dense(weight.t()).to_dense(), weight.t())
    assert torch.equal(CSBMatrix.from_dense(weight[1::2, ::3]).to_dense(), weight[1::2, ::3])
    assert torch.equal(CSBMatrix.from_dense(weight, mask.t()).to_dense(), weight * mask.t())


def test_transpose_is_a_view(device: str) -> None:
    w = build(matrix("uniform_90"), device=device)
    t = w.t()
    for name in ("values", "codes", "blk_ptr", "blk_pad", "units"):
        assert getattr(t, name).data_ptr() == getattr(w, name).data_ptr(), name
    assert t.shape == (w.shape[1], w.shape[0]) and t.transposed and not w.transposed
    assert torch.equal(t.to_dense(), w.to_dense().t())
    assert torch.equal(w.T.t().to_dense(), w.to_dense())
    assert torch.equal(t.to_csr().to_dense(), w.to_dense().t())
    assert np.array_equal(t.to_scipy().toarray(), w.to_dense().t().cpu().numpy())


def test_to_dtype_moves_no_entry() -> None:
    w = build(matrix("uniform_90"))
    half = w.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.codes.data_ptr() == w.codes.data_ptr()
    assert torch.equal(half.to_dense(), w.to_dense().bfloat16())


@pytest.mark.parametrize("block_size", [0, 1, 3, 48, 512, -64])
def test_from_dense_rejects_block_sizes(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size: expected a power of two from 2 to 256, got {block_size}"):
        CSBMatrix.from_dense(torch.ones(4, 4), block_size=block_size)


@pytest.mark.parametrize("make", ["from_dense", "from_coo", "from_csr", "from_scipy"])
def test_the_encoding_is_chosen_by_target_dtype_and_density(make: str) -> None:
    def encoding(density: float, dtype: torch.dtype = torch.float32, **options) -> str:
        weight = (torch.rand(100, 100) < density).to(dtype)
        forms = {"from_coo": lambda: weight.to_sparse(), "from_csr": lambda: weight.to_sparse_csr()}
        forms["from_scipy"] = lambda: scipy.sparse.csr_array(weight.numpy())
        return getattr(CSBMatrix, make)(forms.get(make, lambda: weight)(), **options).layout.encoding

    if make != "from_scipy":  # it has no 16-bit values
        for dtype in (torch.bfloat16, torch.float16):
            assert encoding(0.5, dtype, target="cuda") == "bitmap"
            assert encoding(0.05, dtype, target="cuda") == "codes"
            assert encoding(0.5, dtype, target="cpu") == "codes"
            assert encoding(0.5, dtype, target="cpu", block_size=64) == "codes"
            assert encoding(0.5, dtype, target="cuda", block_size=128) == "codes"
            assert encoding(0.5, dtype, target="cuda", encoding="codes") == "codes"
    assert encoding(0.5, target="cuda") == "codes"
    assert encoding(0.05, encoding="bitmap") == "bitmap"


def test_to_another_dtype_keeps_the_bitmap(device: str) -> None:
    w = build(matrix("uniform_50"), torch.bfloat16, device, "bitmap")
    wide, t = w.to(torch.float64), w.t()
    assert wide.layout == t.layout == w.layout and wide.codes.data_ptr() == t.codes.data_ptr() == w.codes.data_ptr()
    assert torch.equal(wide.to_dense(), w.to_dense().double()) and torch.equal(t.to_dense(), w.to_dense().t())
    assert w.nbytes == sum(t.nbytes for t in (w.values, w.codes, w.blk_ptr, w.blk_pad, w.units))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_weights_as_bitmaps(dtype: torch.dtype, device: str) -> None:
    weight = (torch.randn(130, 70) * (torch.rand(130, 70) < 0.3)).to(device=device, dtype=dtype)
    mask = torch.rand(70, 130, device=device) < 0.5
    for given, kept in ((weight.t(), None), (weight[1::2, ::3], None), (weight, mask.t())):
        w = CSBMatrix.from_dense(given, kept, encoding="bitmap")
        w.validate()
        assert torch.equal(w.to_dense(), given if kept is None else given * kept)


def test_from_dense_rejects_wrong_arguments() -> None:
    with pytest.raises((RuntimeError, ValueError), match="expected a matrix"):
        CSBMatrix.from_dense(torch.ones(4))
    with pytest.raises((RuntimeError, ValueError), match=r"mask: expected shape \(4, 4\), got \(4, 5\)"):
        CSBMatrix.from_dense(torch.ones(4, 4), torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises((RuntimeError, ValueError), match=r"expected dtype .* got (torch\.)?int64"):
        CSBMatrix.from_dense(torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="target"):
        CSBMatrix.from_dense(torch.ones(4, 4), target="tpu")
    with pytest.raises(ValueError, match="encoding: expected None or one of codes, bitmap, got 'bits'"):
        CSBMatrix.from_dense(torch.ones(4, 4), encoding="bits")
    with pytest.raises(ValueError, match="block_size: expected 64 with a bitmap, got 32"):
        CSBMatrix.from_dense(torch.ones(4, 4), encoding="bitmap", block_size=32)


def test_read_smtx(tmp_path: Path) -> None:
    text = "3, 5, 4\n0 2 2 4\n4 1 0 2\n"
    want = torch.zeros(3, 5, dtype=torch.bool)
    want[[0, 0, 2, 2], [4, 1, 0, 2]] = True
    (tmp_path / "a.smtx").write_text(text)
    with gzip.open(tmp_path / "b.smtx.gz", "wt") as file:
        file.write(text)
    assert torch.equal(read_smtx(tmp_path / "a.smtx"), want)
    assert torch.equal(read_smtx(tmp_path / "b.smtx.gz"), want)
    for wrong in ("3, 5\n0 2 2 4\n4 1 0 2\n", "3, 5, 4\n0 2 4\n4 1 0 2\n", "3, 5, 4\n0 2 2 4\n5 1 0 2\n"):
        (tmp_path / "wrong.smtx").write_text(wrong)
        with pytest.raises(ValueError, match=r"wrong\.smtx: expected"):
            read_smtx(tmp_path / "wrong.smtx")


def test_dlmc_round_trip(dlmc: list[Path]) -> None:
    for path in dlmc[:: max(len(dlmc) // 12, 1)]:
        mask = read_smtx(path)
        weight = torch.randn(mask.shape).clamp_min(0.1) * mask
        w = CSBMatrix.from_dense(weight)
        w.validate()
        assert w.nnz == int(mask.sum()), path
        assert torch.equal(w.to_dense(), weight), path
