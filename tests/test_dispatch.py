"""What torch is told about the operators: schemas, fakes, FLOPs, profiler names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import LAYOUTS, activation, build, call, call_sddmm, operands, random_matrix, sddmm_args
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from torch_csb import CSBMatrix
from torch_csb.testing import matrix

OPS = torch.ops.torch_csb


def spmm_args(w: CSBMatrix, layout: str, transposed: bool, bias: bool, act: int) -> tuple[Any, ...]:
    inputs, outputs = (w.m, w.k) if transposed else (w.k, w.m)
    x, dim = activation(layout, inputs, 6, w.dtype, w.device.type)
    b = torch.randn(outputs).to(x) if bias else None
    return *operands(w), x, b, w.m, w.k, w.block_size, dim, act


@pytest.mark.parametrize("layout", ["rows", "nchw", "transposed", "channels_last"])
@pytest.mark.parametrize(("bias", "act"), [(False, 0), (True, 1)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocks", [64, "bitmap"])
def test_opcheck_spmm(blocks: int | str, transposed: bool, bias: bool, act: int, layout: str, device: str) -> None:
    w = random_matrix(70, 50, 0.5, device=device, block_size=blocks)
    op = OPS.spmm_t if transposed else OPS.spmm
    torch.library.opcheck(op.default, spmm_args(w, layout, transposed, bias, act))


@pytest.mark.parametrize("layout", ["rows", "nchw", "transposed"])
@pytest.mark.parametrize("blocks", [64, "bitmap"])
def test_opcheck_sddmm(blocks: int | str, layout: str, device: str) -> None:
    w = random_matrix(70, 50, 0.5, device=device, block_size=blocks)
    a, dim = activation(layout, w.m, 6, w.dtype, device)
    b, _ = activation(layout, w.k, 6, w.dtype, device)
    torch.library.opcheck(OPS.sddmm.default, sddmm_args(w, a, b, dim))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_conversions(masked: bool, device: str) -> None:
    w = random_matrix(70, 50, 0.5, device=device)
    dense = w.to_dense()
    mask = dense != 0 if masked else None
    torch.library.opcheck(OPS.count.default, (dense, mask, 64))
    torch.library.opcheck(OPS.pack.default, (dense, mask, w.blk_ptr, w.blk_pad, 64, w.values.numel()))
    torch.library.opcheck(OPS.unpack.default, (w.values, w.codes, w.blk_ptr, w.blk_pad, 70, 50, 64))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_conversions_of_bitmaps(masked: bool, device: str) -> None:
    w = random_matrix(70, 50, 0.5, device=device, block_size="bitmap")
    dense = w.to_dense()
    mask = dense != 0 if masked else None
    torch.library.opcheck(OPS.pack_bitmap.default, (dense, mask, w.blk_ptr, w.blk_pad, w.values.numel()))
    torch.library.opcheck(OPS.to_codes.default, (w.codes, w.blk_ptr, w.blk_pad, 70, 50, w.values.numel()))
    torch.library.opcheck(OPS.unpack.default, (w.values, w.codes, w.blk_ptr, w.blk_pad, 70, 50, 64))


def test_opcheck_plan() -> None:
    w = random_matrix(700, 500, 0.5)
    torch.library.opcheck(OPS.plan.default, (w.blk_ptr, w.blk_pad, 11, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["spmm", "spmm_t"])
def test_fakes_have_the_real_strides(name: str, layout: str, device: str) -> None:
    w = random_matrix(70, 50, 0.5, torch.bfloat16, device)
    args = spmm_args(w, layout, name == "spmm_t", True, 0)
    real = getattr(OPS, name)(*args)
    with FakeTensorMode() as mode:
        fake = getattr(OPS, name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
    assert (fake.shape, fake.stride(), fake.dtype, fake.device.type) == (real.shape, real.stride(), real.dtype, device)


@pytest.mark.parametrize("n", [0, 6])
def test_fakes_of_empty_results(n: int) -> None:
    for m, k in ((0, 5), (5, 0), (0, 0)):
        w = CSBMatrix.from_dense(torch.zeros(m, k))
        x, y = torch.zeros(n, k), torch.zeros(n, m)
        real = call("spmm", w, x), call("spmm_t", w, y), call_sddmm(w, y, x)
        fake = call("spmm", *_to_meta(w, x)), call("spmm_t", *_to_meta(w, y)), _sddmm_meta(w, y, x)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _to_meta(w: CSBMatrix, x: torch.Tensor) -> tuple[CSBMatrix, torch.Tensor]:
    return w.to("meta"), x.to("meta")


def _sddmm_meta(w: CSBMatrix, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return call_sddmm(w.to("meta"), a.to("meta"), b.to("meta"))


@pytest.mark.parametrize("blocks", [64, "bitmap"])
def test_flop_counter(blocks: int | str, device: str) -> None:
    """Two operations for each stored entry and column, as it is multiply-adds that count, not the dense shape."""
    w = build(matrix("uniform_90"), device=device, block_size=blocks)
    stored = w.values.numel()
    x, y = torch.randn(2, 5, w.k, device=device), torch.randn(2, 5, w.m, device=device)
    image = torch.randn(2, w.k, 3, 4, device=device)
    for run, columns in (
        (lambda: call("spmm", w, x), 10),
        (lambda: call("spmm_t", w, y), 10),
        (lambda: call_sddmm(w, y, x), 10),
        (lambda: call("spmm", w, image, dim=1), 24),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == 2 * stored * columns


def test_flop_counter_of_a_training_step() -> None:
    from torch_csb import ops

    w = build(matrix("uniform_90"))
    w.values.requires_grad_()
    x = torch.randn(10, w.k, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.spmm(w, x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * w.values.numel() * 10


def test_profiler_names(device: str) -> None:
    w = random_matrix(70, 50, 0.5, device=device)
    x, y = torch.randn(4, 50, device=device), torch.randn(4, 70, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call("spmm", w, x), call("spmm_t", w, y), call_sddmm(w, y, x)
    names = {event.key for event in profile.key_averages()}
    assert {"torch_csb::spmm", "torch_csb::spmm_t", "torch_csb::sddmm"} <= names


def test_operators_are_functional() -> None:
    """No op writes to an argument or returns a view of one."""
    for name in ("spmm", "spmm_t", "sddmm", "count", "pack", "pack_bitmap", "unpack", "to_codes", "plan"):
        schema = getattr(OPS, name).default._schema
        assert not schema.is_mutable, name
        assert all(result.alias_info is None for result in schema.returns), name


def test_every_operator_is_checked() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("torch_csb::")}
    checked = {"spmm", "spmm_t", "sddmm", "count", "pack", "pack_bitmap", "unpack", "to_codes", "plan"}
    checked |= {"csr_row_split", "csr_merge", "csr_row_swizzle", "csr_sddmm"}  # in test_baselines.py
    checked |= {"product", "sampled"}  # made of these, for compilers; in test_export.py
    assert {name for name in names if "." not in name} - {"build_info"} == checked


def test_build_info() -> None:
    info = OPS.build_info()
    assert isinstance(info, str) and "cpu" in info.lower()
