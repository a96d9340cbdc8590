"""`bench step`: what it counts, and that it refuses wrong gradients. No time that is measured here means anything."""

from __future__ import annotations

import argparse
import csv
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from torch_csb import autograd
from torch_csb.bench import pictures, step
from torch_csb.bench.step import StepRow
from torch_csb.bench.trainee import PARTS

WIDTH, DEPTH, BATCH = 128, 3, 16


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(step, "SECONDS", {"cpu": 0.001, "cuda": 0.001})
    # Drawing takes longer than everything else; one test turns it on again.
    monkeypatch.setattr(pictures, "new_figure", lambda width, height: None)
    monkeypatch.chdir(tmp_path)


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    sizes = ["--width", str(WIDTH), "--depth", str(DEPTH), "--batch", str(BATCH)]
    common = ["--device", "cpu", "--results", "results", "--plots", "plots", "--commit", "abc"]
    return step.run(parser.parse_args([*common, *sizes, *arguments]))


def written() -> list[dict[str, str]]:
    files = list(Path("results").glob("*/train_step.csv"))
    assert len(files) == 1
    with files[0].open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of_a_step(device: str, dtype: str) -> dict[str, StepRow]:
    rows = step.measure(device, dtype, WIDTH, DEPTH, BATCH, 0.9, 0, commit="abc")
    assert [row.variant for row in rows] == ["dense", "masked", "csb"]
    return {row.variant: row for row in rows}


def check_sizes(rows: dict[str, StepRow], item: int) -> None:
    """What can be said beforehand, in bytes; an allocator may round each tensor up to 512."""
    weight, bias = WIDTH * WIDTH * item, WIDTH * item
    dense, masked, csb = (rows[variant] for variant in ("dense", "masked", "csb"))
    assert dense.weights_bytes == DEPTH * (weight + bias)
    assert masked.weights_bytes == DEPTH * (2 * weight + bias)
    assert csb.weights_bytes < 0.5 * dense.weights_bytes
    assert dense.gradients_bytes == masked.gradients_bytes == DEPTH * (weight + bias)
    for row in rows.values():
        assert row.us > 0 and row.us_spread >= 0 and row.rel_err < step.TORCH_ERROR
        assert row.gradients_bytes <= row.weights_bytes
        on_host = 4 * 2 * DEPTH if row.peak_bytes is None else 0
        assert row.optimizer_bytes == 2 * row.gradients_bytes + on_host
    # Outputs of ReLU, and of the net for the loss.
    activations = DEPTH * BATCH * WIDTH * item
    for row in (dense, csb):
        # On CUDA the loss is one element at the head of the squared differences' memory.
        assert activations <= row.activations_bytes <= activations + max(4 * 512, BATCH * WIDTH * item)
    assert masked.activations_bytes >= activations + (DEPTH - 1) * weight
    assert masked.ratio_to_masked == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_on_the_cpu(dtype: str) -> None:
    rows = rows_of_a_step("cpu", dtype)
    check_sizes(rows, getattr(torch, dtype).itemsize)
    assert all(row.peak_bytes is None and row.workspace_bytes is None for row in rows.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_on_cuda(dtype: str) -> None:
    rows = rows_of_a_step("cuda", dtype)
    check_sizes(rows, getattr(torch, dtype).itemsize)
    for row in rows.values():
        assert row.peak_bytes == sum(getattr(row, f"{part}_bytes") for part in PARTS)
        assert row.peak_bytes >= row.weights_bytes + row.optimizer_bytes
    assert rows["csb"].peak_bytes < rows["dense"].peak_bytes < rows["masked"].peak_bytes


def test_rows_and_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench() == 0
    rows = written()
    assert list(rows[0]) == [field.name for field in fields(StepRow)]
    assert [row["variant"] for row in rows] == ["dense", "masked", "csb"]
    assert {row["peak_bytes"] for row in rows} == {""} and {row["commit"] for row in rows} == {"abc"}
    out = capsys.readouterr().out
    assert "masked/this" in out and "3 layers 128 wide, batch 16, 90 % zeros, MiB" in out
    assert bench("--resume") == 0
    assert written() == rows and "skipped" in capsys.readouterr().out
    assert bench("--resume", "--sparsity", "0.8") == 0
    assert len(written()) == 2 * len(rows)


def test_the_regime_runs_it_at_its_default_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "WIDTH", WIDTH)
    monkeypatch.setattr(step, "BATCH", {"cpu": BATCH})
    options = {"device": "cpu", "results": Path("results"), "plots": Path("plots"), "commit": "abc", "seed": 0}
    assert step.run_for_regime(argparse.Namespace(**options, resume=False)) == 0
    assert {row["depth"] for row in written()} == {"4"}


@pytest.mark.parametrize("name", ["_sddmm", "_fast_spmm", "_fast_spmm_t"])
def test_wrong_gradients_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(autograd, name)
    for alias in {name, name.replace("_sddmm", "_fast_sddmm")}:
        monkeypatch.setattr(autograd, alias, lambda *arguments: right(*arguments) * 1.001)
    assert bench() == 1
    assert not Path("results").exists()
    out = capsys.readouterr().out
    assert "csb: relative error" in out and "Nothing was written" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "0"], "width: expected at least 1, got 0"),
        (["--depth", "-1"], "depth: expected at least 1, got -1"),
        (["--sparsity", "90"], "sparsity: expected a number between 0 and 1, got 90"),
        (["--sparsity", "0.2"], "step: expected all 3 layers to be converted"),
    ],
)
@pytest.mark.filterwarnings("ignore:sparsify_ converted none")
def test_errors_say_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().out
    assert not Path("results").exists()


def test_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = list(rows_of_a_step("cpu", "float32").values())
    monkeypatch.undo()
    step.draw(rows, tmp_path / "plots" / "train_step.png")
    assert (tmp_path / "plots" / "train_step.png").stat().st_size > 1000
