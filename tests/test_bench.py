"""The regimes of the benchmark: what they write, what they skip, and that a wrong result writes nothing."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torch_csb import CSBMatrix, ops
from torch_csb.bench import report, timing
from torch_csb.bench.__main__ import main
from torch_csb.bench.cases import OURS, PEERS, REGIMES, SHAPES, SPARSITIES, cases_of, weights_of
from torch_csb.bench.implementations import CSB, IMPLEMENTATIONS, layouts_offered, replicate
from torch_csb.bench.judge import Judge, WrongResult
from torch_csb.bench.patterns import PATTERNS, Collection, make_mask

HEADER = (  # noqa: SIM905
    "date,commit,device,torch,regime,m,k,n,dtype,pattern,layout,sparsity,direction,impl,us,us_spread,gbps,tflops,"
    "limit_share,ratio_to_dense,rel_err"
).split(",")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceilings' products and tensors are large on purpose, for which a test has no time."""
    monkeypatch.setattr("torch_csb.bench.limits.LARGE", {"cpu": (1 << 16, (64,)), "cuda": (1 << 20, (256,))})


class Runner:
    """Runs a command with small cases on one device; the CSVs go to a folder of the test's."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder

    def __call__(self, command: str, *arguments: str) -> int:
        where = ["--device", self.device, "--results", str(self.folder / "results")]
        where += ["--plots", str(self.folder / "plots"), "--commit", "abc"]
        return main([command, *map(str, arguments), *where])

    def measure(self, *arguments: str, regime: str = "decode") -> int:
        """A regime on one small weight."""
        options = ["--shape", "96x80", "--sparsity", "0.9", "--n", "3", "--seconds", "0.01"]
        return self(regime, *options, *arguments)

    def path(self, regime: str) -> Path:
        return report.csv_path(self.folder / "results", report.device_name(self.device), regime)

    def rows(self, regime: str = "decode") -> list[dict[str, str]]:
        return report.read_csv(self.path(regime))


@pytest.fixture
def bench(device: str, tmp_path: Path) -> Runner:
    return Runner(device, tmp_path)


def test_rows_have_the_documented_columns(bench: Runner) -> None:
    assert bench.measure("--grid", "full", "--pattern", "uniform", "--dtype", "float32") == 0
    with bench.path("decode").open(newline="") as file:
        assert next(csv.reader(file)) == HEADER
    rows = bench.rows()
    assert {row["direction"] for row in rows} == {"F", "T"}
    expected = {"csb", "dense", "torch_csr", "csr_row_split"}
    if bench.device == "cuda":
        expected |= {"dense_tf32", "csr_merge", "csr_row_swizzle"}
    for direction in ("F", "T"):
        assert {row["impl"] for row in rows if row["direction"] == direction} == expected
        assert {row["layout"] for row in rows if (row["direction"], row["impl"]) == (direction, "csb")} == {
            "last",
            "first",
        }
        assert len([row for row in rows if (row["direction"], row["impl"]) == (direction, "dense")]) == 1
    for row in rows:
        assert (row["m"], row["k"], row["n"], row["sparsity"], row["commit"]) == ("96", "80", "3", "0.9", "abc")
        assert row["regime"] == "decode" and row["pattern"] == "uniform" and "T" in row["date"]
        assert float(row["us"]) > 0 and float(row["limit_share"]) > 0 and float(row["gbps"]) > 0
        assert float(row["rel_err"]) < (1e-2 if row["impl"] == "dense_tf32" else 1e-5)
        dense = next(r for r in rows if (r["direction"], r["impl"]) == (row["direction"], "dense"))
        assert float(row["ratio_to_dense"]) == pytest.approx(float(dense["us"]) / float(row["us"]), rel=2e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_and_direction_is_measured(bench: Runner, pattern: str) -> None:
    assert bench.measure("--pattern", pattern, "--direction", "dW", "--direction", "T", regime="fp32") == 0
    assert {(row["direction"], row["impl"]) for row in bench.rows("fp32")} >= {("dW", "csb"), ("T", "dense")}


def test_the_gradients_peers_are_measured(bench: Runner) -> None:
    assert bench.measure("--grid", "full", "--pattern", "uniform", "--dtype", "float32", regime="sddmm") == 0
    assert {row["impl"] for row in bench.rows("sddmm")} >= {"csb", "dense", "torch_csr", "csr_sddmm"}


def test_an_implementation_that_fails_is_not_left_out(bench: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts_offered.cache_clear()

    def fail(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(ops, "spmm", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.measure("--dtype", "float32")
    layouts_offered.cache_clear()


def test_a_ratio_is_never_without_its_dense_row(bench: Runner) -> None:
    assert bench.measure("--impl", "csb") == 0
    assert {row["impl"] for row in bench.rows()} == {"csb", "dense"}


def test_resume_skips_what_is_there(bench: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.measure() == 0
    before = bench.rows()
    assert bench.measure("--resume") == 0
    assert bench.rows() == before and "0 cases" in capsys.readouterr().out
    assert bench.measure("--resume", "--n", "5") == 0
    assert {row["n"] for row in bench.rows()[len(before) :]} == {"5"}
    assert bench.measure("--resume", "--commit", "def") == 0, "rows of another commit are no reason to skip"


def test_a_dry_run_writes_nothing(bench: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.measure("--dry-run") == 0
    assert "2 cases" in capsys.readouterr().out
    assert not list(bench.folder.rglob("*.csv"))


def test_the_time_limit_stops_before_a_weight(bench: Runner) -> None:
    assert bench.measure("--sparsity", "0.5", "--minutes", "1e-9") == 0
    assert bench.rows() == []


@pytest.mark.parametrize(
    "wrong", [["--sparsity", "1.5"], ["--n", "0"], ["--shape", "4096"], ["--shape", "0x8"], ["--pattern", "spiral"]]
)
def test_wrong_arguments_say_which(bench: Runner, capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    try:
        status = bench.measure(*wrong)
    except SystemExit as error:
        status = error.code
    assert status == 2
    output = capsys.readouterr()
    assert wrong[0] in output.out + output.err and "expected" in output.out + output.err


# --- the judge ---


def off_by_one_percent(w: CSBMatrix) -> CSBMatrix:
    """W with its largest value changed by 1 %."""
    values = w.values.clone()
    values[values.abs().argmax()] *= 1.01
    return CSBMatrix(values, w.codes, w.blk_ptr, w.blk_pad, w.units, m=w.m, k=w.k, layout=w.layout)


@pytest.mark.parametrize("direction", ["F", "T"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_value_writes_no_row(
    bench: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str, direction: str
) -> None:
    """The matrix that is multiplied isn't the one that was to be packed; in 16 bit the output alone can't tell."""
    pack = CSB.pack
    monkeypatch.setattr(CSB, "pack", lambda self, dense, way: off_by_one_percent(pack(self, dense, way)))
    assert bench.measure("--dtype", dtype, "--direction", direction) == 1
    assert "csb" in capsys.readouterr().out
    assert bench.rows() == []


def test_a_value_changed_inside_the_operator_writes_no_row(bench: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    spmm = ops.spmm
    monkeypatch.setattr(ops, "spmm", lambda w, x, **how: spmm(off_by_one_percent(w), x, **how))
    assert bench.measure("--dtype", "float32", "--direction", "F") == 1
    assert bench.rows() == []


def test_a_wrong_gradient_writes_no_row(bench: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    sddmm = ops.sddmm
    monkeypatch.setattr(ops, "sddmm", lambda w, y, x, **how: sddmm(w, y, x, **how) * 1.001)
    assert bench.measure("--dtype", "float32", regime="sddmm") == 1
    assert bench.rows("sddmm") == []


def test_a_wrong_baseline_writes_no_row(bench: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = IMPLEMENTATIONS["csr_row_split"]
    multiply = baseline.multiply
    monkeypatch.setattr(
        baseline, "multiply", lambda w, direction, layout, x, y: multiply(w, direction, layout, x, y) + 1e-3
    )
    assert bench.measure("--impl", "csr_row_split", "--dtype", "float32") == 1
    assert bench.rows() == []


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 0.0])
def test_an_unwritten_element_is_wrong(device: str, wrong: float) -> None:
    dense = torch.randn(40, 30, device=device) * (torch.rand(40, 30, device=device) < 0.3)
    x = torch.randn(5, 30, device=device)
    judge = Judge(dense, "F", x, None)
    result = ops.spmm(CSBMatrix.from_dense(dense), x)
    assert judge.relative_error(CSB(), None, "last", result) < 1e-6
    result[3, dense.count_nonzero(1).argmax()] = wrong
    with pytest.raises(WrongResult):
        judge.relative_error(CSB(), None, "last", result)


@pytest.mark.parametrize("direction", ["F", "T", "dW"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_right_results_pass_at_length(device: str, dtype: torch.dtype, direction: str) -> None:
    """Long sums, for which the bound is the tightest in relation to the terms."""
    m, k, n = 64, 6000, 700
    dense = torch.randn(m, k, device=device).to(dtype)
    x, y = torch.randn(n, k, device=device).to(dtype), torch.randn(n, m, device=device).to(dtype)
    w = CSB().pack(dense, direction)
    judge = Judge(dense, direction, x if direction != "T" else None, y if direction != "F" else None)
    result = CSB().multiply(w, direction, "last", x, y)
    assert judge.relative_error(CSB(), w, "last", result) < 64 * torch.finfo(dtype).eps


# --- timing ---


def test_the_judge_sees_every_timed_implementation(device: str) -> None:
    seen = []
    x = torch.ones(64, device=device)
    calls = {"double": [lambda: 2 * x] * 3, "triple": [lambda: 3 * x] * 3}
    times = timing.time_all(device, calls, 0.01, lambda name, result: seen.append((name, result[0].item())))
    assert set(seen) == {("double", 2.0), ("triple", 3.0)}
    assert all(time.us > 0 and time.us_spread >= 0 for time in times.values())


def test_a_long_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONG_CALL_S", 0.0)
    count = {"n": 0}

    def call() -> None:
        count["n"] += 1

    assert len(timing.alternate({"long": call}, 10.0)["long"]) == 1
    assert count["n"] == 2, "a first call that nobody times, and the timed one"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestTimingOnAGpu:
    def test_a_graph_is_replayed(self) -> None:
        x = torch.ones(1 << 20, device="cuda")
        assert timing.time_cuda([lambda: x + 1, lambda: x + 1]).mode == "graph"

    def test_what_synchronises_is_launched(self) -> None:
        x = torch.ones(1 << 10, device="cuda")
        result = timing.time_cuda([lambda: x * x.sum().item()] * 2, judge=lambda result: result)
        assert result.mode == "launched"
        assert timing.time_cuda([lambda: x + torch.randn_like(x)] * 2).mode == "graph", "a failure leaves no trace"
        assert torch.randn(9, device="cuda").isfinite().all()

    def test_results_are_poisoned_before_the_replay(self) -> None:
        """A call that leaves its result unwritten on replay must not pass with what an earlier call left there."""
        x, out, first = torch.ones(64, device="cuda"), torch.empty(64, device="cuda"), []

        def lazy() -> Tensor:
            if torch.cuda.is_current_stream_capturing():
                return out
            first.append(1)
            return out.copy_(x)

        seen = []
        timing.time_cuda([lazy, lazy], judge=lambda result: seen.append(result.isnan().all().item()))
        assert first and all(seen)

    def test_copies_exceed_the_cache(self) -> None:
        size = 1 << 20
        assert timing.copies_for_cold_cache(1) == timing.MOST_COPIES
        assert timing.copies_for_cold_cache(size) * size >= 3 * timing.l2_bytes()


def test_copies_are_equal_and_apart(device: str) -> None:
    arrays = [torch.arange(7, device=device), torch.rand(3, 5, device=device), torch.empty(0, device=device)]
    copies = replicate(arrays, 4)
    assert len(copies) == 4
    for copy in copies:
        assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(arrays, copy, strict=True))
        assert all(b.data_ptr() % 16 == 0 for b in copy if b.numel())
    assert len({copy[1].data_ptr() for copy in copies}) == 4


# --- grids, patterns, files ---


def test_the_full_grid_has_what_the_quick_one_leaves_out() -> None:
    quick, full = REGIMES["decode"], REGIMES["decode"].full()
    assert quick.shapes == full.shapes == SHAPES
    assert set(full.sparsities) == set(SPARSITIES) and set(full.patterns) == set(PATTERNS)
    for weights in weights_of(full, None):
        wanted = set(cases_of(full, weights)[0].implementations)
        assert wanted == ({*OURS, *PEERS} if weights.pattern == "uniform" else set(OURS))
    assert all(set(case.implementations) == set(OURS) for w in weights_of(quick, None) for case in cases_of(quick, w))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_have_the_same_number_of_nonzeros(device: str, pattern: str, sparsity: float) -> None:
    mask = make_mask(pattern, 1024, 768, sparsity, device, torch.Generator(device).manual_seed(1))
    assert mask.float().mean().item() == pytest.approx(1 - sparsity, rel=0.03)
    rows, columns = mask.sum(1), mask.sum(0)
    if pattern == "full_row":
        assert rows.max() == 768 and (rows == 768).sum() == 1
    if pattern == "full_col":
        assert columns.max() == 1024
    if pattern == "half_empty" and sparsity >= 0.5:
        assert not mask[:, 384:].any()
    if pattern == "powerlaw":
        assert rows.max() > (2 if sparsity == 0.5 else 5) * rows.median()


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Three files, the last without a nonzero, in the collection's folders."""
    folder = tmp_path / "dlmc"
    files = {
        "transformer/random_pruning/0.5/body.smtx": "2, 4, 4\n0 2 4\n0 2 1 3\n",
        "rn50/magnitude_pruning/0.9/conv.smtx.gz": "3, 2, 2\n0 1 1 2\n1 0\n",
        "rn50/magnitude_pruning/0.98/conv.smtx.gz": "3, 2, 0\n0 0 0 0\n\n",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    (folder / "rn50_batchsizes.txt").write_text("conv,7\n")
    return folder


def test_the_collection_is_measured(bench: Runner, collection: Path) -> None:
    assert bench("dlmc", "--dlmc", collection, "--dtype", "float32", "--grid", "full", "--seconds", "0.001") == 0
    rows = [row for row in bench.rows("dlmc") if row["impl"] == "csb" and row["layout"] == "first"]
    cases = {(row["pattern"], row["n"], row["sparsity"]) for row in rows}
    assert cases == {
        ("dlmc:transformer/random_pruning/0.5/body", "256", "0.5"),
        ("dlmc:rn50/magnitude_pruning/0.9/conv", "7", "0.9"),
        ("dlmc:rn50/magnitude_pruning/0.9/conv", "448", "0.9"),
        ("dlmc:rn50/magnitude_pruning/0.98/conv", "7", "0.98"),
        ("dlmc:rn50/magnitude_pruning/0.98/conv", "448", "0.98"),
    }


def test_a_folder_without_the_collection_is_refused(
    bench: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("dlmc", "--dlmc", tmp_path) == 2
    assert "--dlmc" in capsys.readouterr().out


def test_a_layer_without_its_columns_is_refused(collection: Path) -> None:
    (collection / "rn50_batchsizes.txt").unlink()
    with pytest.raises(ValueError, match="rn50_batchsizes.txt"):
        Collection(collection).columns("dlmc:rn50/magnitude_pruning/0.9/conv")


def test_the_real_collection_is_read_whole(dlmc: list[Path], request: pytest.FixtureRequest) -> None:
    folder = Path(request.config.getoption("--dlmc"))
    whole = Collection(folder)
    assert len(whole.files) == len(dlmc)
    for path in whole.files:
        pattern = whole.pattern(path)
        assert whole.path(pattern) == path and whole.columns(pattern) and 0 < whole.sparsity(pattern) < 1


def test_a_csv_with_other_columns_is_not_mixed(bench: Runner) -> None:
    bench.path("decode").parent.mkdir(parents=True)
    bench.path("decode").write_text("a,b\n1,2\n")
    assert bench.measure() == 1
    assert bench.path("decode").read_text() == "a,b\n1,2\n"


def test_the_summary_counts_the_newest_rows(bench: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.measure() == 0
    path = bench.path("decode")
    rows = report.read_csv(path)
    for row in rows:
        if (row["direction"], row["impl"]) == ("F", "csb"):
            row |= {"date": "2999-01-01T00:00:00+00:00", "ratio_to_dense": "123.4"}
    report.append_csv([report.from_cells(row) for row in rows], path)
    capsys.readouterr()
    assert bench("summary", path) == 0
    out = capsys.readouterr().out
    assert "123.40" in out and "of 2 rows" in out


def test_repeat_compares_two_runs(bench: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.measure() == 0
    path = bench.path("decode")
    assert bench("repeat", path, "--limit", "1e9", "--seconds", "0.01") == 0
    assert "median difference" in capsys.readouterr().out
    # A run that was ten thousand times slower must be noticed.
    lines = [row | {"us": str(1e4 * float(row["us"]))} for row in report.read_csv(path)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(lines)
    assert bench("repeat", path, "--seconds", "0.01") == 1
    assert bench("repeat", bench.folder / "none.csv") == 2
