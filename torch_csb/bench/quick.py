"""The three operators at 4096 x 4096, 90 %, against the dense layer and torch's CSR; --pack times the conversion.

Every timed result is compared with float64 in the same run. torch's CSR gets its activations as [k, n], which suits it;
CSB and the dense layer get [n, k]. Losing rows are printed last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_csb import CSBMatrix, ops, reference
from torch_csb._progress import progress
from torch_csb.bench import report
from torch_csb.bench.limits import limit_us
from torch_csb.bench.report import Row
from torch_csb.bench.timing import Timing, copies_for_cold_cache, time_cpu, time_cuda
from torch_csb.testing import uniform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
COLUMNS = (1, 64, 4096)
DIRECTIONS = ("F", "T", "SDDMM")
SHOWN = ("n", "direction", "impl", "us", "us_spread", "gbps", "tflops", "limit_share", "ratio_to_dense", "rel_err")
# torch's csr.t() product on a CPU can take minutes; a call that a smaller n predicts to take longer is left out.
LONGEST_CALL_S = 20.0


@dataclass
class Operands:
    """One set of inputs. Copies of it keep the caches cold."""

    w: CSBMatrix
    dense: Tensor
    csr: Tensor
    x: Tensor  # [n, k]
    y: Tensor  # [n, m]
    x_columns: Tensor  # [k, n]
    y_columns: Tensor

    def copy(self) -> Operands:
        w = self.w
        arrays = (array.clone() for array in (w.values, w.codes, w.blk_ptr, w.blk_pad, w.units))
        copied = CSBMatrix(*arrays, m=w.m, k=w.k, layout=w.layout)
        return Operands(copied, *(t.clone() for t in list(vars(self).values())[1:]))


# (direction, impl): a function of the operands, and one that brings its result into the reference's form.
IMPLEMENTATIONS: dict[tuple[str, str], tuple[Callable[[Operands], Tensor], Callable[[Tensor, Operands], Tensor]]] = {
    ("F", "csb"): (lambda o: ops.spmm(o.w, o.x), lambda r, o: r),
    ("F", "dense"): (lambda o: F.linear(o.x, o.dense), lambda r, o: r),
    ("F", "torch_csr"): (lambda o: o.csr @ o.x_columns, lambda r, o: r.t()),
    ("T", "csb"): (lambda o: ops.spmm_t(o.w, o.y), lambda r, o: r),
    ("T", "dense"): (lambda o: o.y @ o.dense, lambda r, o: r),
    ("T", "torch_csr"): (lambda o: o.csr.t() @ o.y_columns, lambda r, o: r.t()),
    ("SDDMM", "csb"): (lambda o: ops.sddmm(o.w, o.y, o.x), lambda r, o: r[reference.decode(o.w).index]),
    ("SDDMM", "dense"): (lambda o: o.y.t() @ o.x, lambda r, o: r[_places(o)]),
    ("SDDMM", "torch_csr"): (
        lambda o: torch.sparse.sampled_addmm(o.csr, o.y.t(), o.x, beta=0.0),
        lambda r, o: r.to_dense()[_places(o)],
    ),
}


def _places(o: Operands) -> tuple[Tensor, Tensor]:
    at = reference.decode(o.w)
    return at.row, at.col


def _expected(direction: str, o: Operands) -> Tensor:
    x, y, dense = o.x.double(), o.y.double(), o.dense.double()
    if direction == "F":
        return x @ dense.t()
    if direction == "T":
        return y @ dense
    return (y.t() @ x)[_places(o)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: float32, on CUDA bfloat16 too")
    parser.add_argument("--columns", type=int, action="append", help=f"default: {COLUMNS}")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--block-size", type=int, help="default: what suits the device")
    parser.add_argument("--seconds", type=float, default=2.0, help="on the CPU, for the calls of one case")
    parser.add_argument("--pack", action="store_true", help="time the packing of a 28672 x 8192 weight instead")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="rows are appended below it")


def run(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    rows = pack(options) if options.pack else products(options)
    columns = SHOWN if not options.pack else ("m", "k", "dtype", "impl", "us", "us_spread")
    print(report.table(rows, ("dtype", *columns) if not options.pack else columns))
    losing = [row for row in rows if row.impl == "csb" and (row.ratio_to_dense or 1.0) < 1.0]
    if losing:
        print("\nslower than dense:")
        print(report.table(losing, ("dtype", *SHOWN)))
    print(f"\nappended to {report.append_csv(rows, options.results, 'quick')}")
    return 0


def products(options: argparse.Namespace) -> list[Row]:
    default = ["float32", "bfloat16"] if options.device == "cuda" else ["float32"]
    cases = [
        (dtype, n, direction)
        for dtype in options.dtype or default
        for n in sorted(options.columns or COLUMNS)
        for direction in DIRECTIONS
    ]
    rows: list[Row] = []
    operands: dict[tuple[str, int], Operands] = {}
    for dtype, n, direction in progress(cases, "quick", "cases"):
        if (dtype, n) not in operands:
            operands = {(dtype, n): _operands(options, DTYPES[dtype], n)}
        rows += _case(options, operands[dtype, n], direction, rows)
    return rows


def _operands(options: argparse.Namespace, dtype: torch.dtype, n: int) -> Operands:
    size, device = options.size, options.device
    dense = torch.randn(size, size) * uniform(size, size, options.sparsity)
    dense = dense.to(device=device, dtype=dtype)
    w = CSBMatrix.from_dense(dense, block_size=options.block_size, target=device)
    csr = torch.sparse_csr_tensor(*_int32_csr(w.to_csr()), size=dense.shape, check_invariants=False)
    x, y = (torch.randn(n, size, device=device).to(dtype) for _ in range(2))
    return Operands(w, dense, csr, x, y, x.t().contiguous(), y.t().contiguous())


def _int32_csr(csr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return csr.crow_indices().int(), csr.col_indices().int(), csr.values()


def _case(options: argparse.Namespace, o: Operands, direction: str, earlier: list[Row]) -> list[Row]:
    """The rows of every implementation of a direction that this device and dtype have."""
    n, dtype = len(o.x), str(o.w.dtype).removeprefix("torch.")
    want = _expected(direction, o)
    errors: dict[str, float] = {}
    for name in ("csb", "dense", "torch_csr"):
        function, form = IMPLEMENTATIONS[direction, name]
        slowest = [r for r in earlier if (r.dtype, r.direction, r.impl) == (dtype, direction, name)]
        if slowest and 1e-6 * slowest[-1].us * n / slowest[-1].n > LONGEST_CALL_S:
            continue
        try:
            result = function(o)
        except (RuntimeError, NotImplementedError) as error:
            if name != "torch_csr":
                raise
            print(f"torch's CSR has no {direction} for {dtype} here: {str(error).splitlines()[0]}")
            continue
        errors[name] = ((form(result, o).double() - want).norm() / want.norm()).item()
        del result
    if errors["csb"] > max(2 * errors["dense"], 32 * torch.finfo(o.w.dtype).eps):
        raise AssertionError(
            f"{direction}, n={n}, {dtype}: relative error {errors['csb']:.3g}, dense {errors['dense']:.3g}"
        )

    timings = _time(options, o, direction, list(errors))
    where, device = report.provenance(options.device), report.device_name(options.device)
    rows = []
    for name, timing in timings.items():
        flops, moved = _work(o, direction, name)
        limit = limit_us(device, o.w.dtype, moved, flops)
        rows.append(
            Row(
                **where,
                regime=timing.regime,
                m=o.w.m,
                k=o.w.k,
                n=n,
                dtype=dtype,
                pattern="uniform",
                layout="columns" if name == "torch_csr" and direction != "SDDMM" else "rows",
                sparsity=options.sparsity,
                direction=direction,
                impl=name,
                us=timing.us,
                us_spread=timing.us_spread,
                gbps=moved / timing.us * 1e-3,
                tflops=flops / timing.us * 1e-6,
                limit_share=None if limit is None else limit / timing.us,
                ratio_to_dense=timings["dense"].us / timing.us,
                rel_err=errors[name],
            )
        )
    return rows


def _time(options: argparse.Namespace, o: Operands, direction: str, names: list[str]) -> dict[str, Timing]:
    functions = {name: IMPLEMENTATIONS[direction, name][0] for name in names}
    with torch.no_grad():
        if options.device == "cpu":
            return time_cpu({name: _bind(f, o) for name, f in functions.items()}, options.seconds)
        timings = {}
        for name, function in functions.items():
            count = copies_for_cold_cache(_work(o, direction, name)[1])
            sets = [o, *(o.copy() for _ in range(count - 1))]
            timings[name] = time_cuda([_bind(function, copy) for copy in sets])
        return timings


def _bind(function: Callable[[Operands], Tensor], o: Operands) -> Callable[[], Tensor]:
    return lambda: function(o)


def _work(o: Operands, direction: str, name: str) -> tuple[float, float]:
    """(operations, bytes moved when everything is read or written once) of an implementation."""
    w, item = o.w, o.w.dtype.itemsize
    dense = name == "dense"
    elements = w.m * w.k if dense else w.nnz
    if dense:
        weight = elements * item
    elif name == "csb":
        weight = w.nbytes
    else:
        weight = elements * (item + 4) + 4 * (w.m + 1)
    return 2.0 * elements * len(o.x), weight + (o.x.numel() + o.y.numel()) * item


def pack(options: argparse.Namespace) -> list[Row]:
    """CSBMatrix.from_dense of a 28672 x 8192 weight: what converting one large layer takes."""
    m, k, rows = 28672, 8192, []
    where = report.provenance(options.device)
    for dtype in progress(options.dtype or ["float32", "bfloat16"], "pack", "dtypes"):
        weight = torch.empty(m, k, device=options.device, dtype=DTYPES[dtype])
        for part in weight.split(4096):
            part.copy_(torch.randn(part.shape) * uniform(*part.shape, options.sparsity))
        seconds = []
        for _ in range(4):
            _synchronize(options.device)
            start = time.perf_counter()
            w = CSBMatrix.from_dense(weight, block_size=options.block_size, target=options.device)
            _synchronize(options.device)
            seconds.append(time.perf_counter() - start)
        if not torch.equal(w.to_dense(), weight):
            raise AssertionError("the packed weight does not unpack to itself")
        timing = Timing.of(seconds[1:], "eager" if options.device == "cuda" else "cpu")
        moved = 2 * weight.nbytes + w.nbytes
        rows.append(
            Row(
                **where,
                regime=timing.regime,
                m=m,
                k=k,
                n=0,
                dtype=dtype,
                pattern="uniform",
                layout="rows",
                sparsity=options.sparsity,
                direction="pack",
                impl="csb",
                us=timing.us,
                us_spread=timing.us_spread,
                gbps=moved / timing.us * 1e-3,
                rel_err=0.0,
            )
        )
    return rows


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
