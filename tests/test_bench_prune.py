"""`python -m torch_csb.bench prune`: one seed of a few methods, its rows and pictures, resuming, and its verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from torch_csb.bench import __main__, prune, prune_summary, pruning
from torch_csb.bench.report import read_csv

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def bench(*arguments: str) -> int:
    common = ["--device", "cpu", "--results", "results", "--plots", "plots", "--commit", "abc"]
    return __main__.main(["prune", *common, *arguments])


SMALL = ("--seeds", "1", "--epochs", "3", "--sparsity", "0.9")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows() -> list[dict[str, str]]:
    return read_csv(Path("results/cpu/prune.csv"))


def without(row: dict[str, str], *columns: str) -> dict[str, str]:
    return {name: text for name, text in row.items() if name not in columns}


def test_magnitude_beats_random_and_an_interrupted_run_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = (*SMALL, "--method", "random", "--method", "magnitude")
    run = pruning.Runs.run

    def interrupted(runs: pruning.Runs, method: str, sparsity: float) -> dict[str, object]:
        if method == "random":
            raise KeyboardInterrupt
        return run(runs, method, sparsity)

    with monkeypatch.context() as patch:
        patch.setattr(pruning.Runs, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench(*two)
    assert [row["method"] for row in rows()] == ["magnitude"]
    assert bench(*two, "--resume") == 0
    said = capsys.readouterr().out
    assert "1 of 2 runs to do" in said and "one seed, so no error bars" in said
    magnitude, random = rows()
    assert (magnitude["method"], random["method"]) == ("magnitude", "random")
    for row in (magnitude, random):
        assert row["commit"] == "abc" and row["epochs"] == "3" and row["achieved_sparsity"] == "0.9"
        assert row["bytes_file"] == ""
    assert magnitude["accuracy_dense"] == random["accuracy_dense"] and float(random["accuracy_dense"]) > 60
    assert float(magnitude["accuracy_csb"]) > float(random["accuracy_csb"]) + 10
    pytest.importorskip("matplotlib")
    assert Path("plots/cpu/prune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["variational", "l0", "coarse-kernel"])
def test_a_run_repeats_and_reaches_its_sparsity(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "SEARCHES", 1)
    data = prune.digits.load("cpu")
    first, again = (pruning.Runs(data, 2, 3).run(method, 0.8) for _ in range(2))
    assert without(first, "seconds") == without(again, "seconds")
    assert first["achieved_sparsity"] == pytest.approx(0.8, abs=0.01)


def test_what_is_fine_tuned_is_csb_where_it_was_pruned() -> None:
    runs = pruning.Runs(prune.digits.load("cpu"), 1, 0)
    runs.run("magnitude", 0.3)
    (model, masks), *_ = runs._magnitude.values()
    assert {name: type(layer).__name__ for name, layer in model.named_children()} == {
        "stem": "Conv2d", "widen": "CSBConv2d", "mix": "CSBConv2d", "hidden": "CSBLinear", "classifier": "Linear"
    }  # fmt: skip
    assert all(model.get_submodule(name).nnz == mask.sum() for name, mask in masks.items())


def test_controls_and_sharing_start_from_magnitude(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("magnitude", pruning.SCRATCH, pruning.SHARED)
    assert bench(*SMALL, *(word for name in names for word in ("--method", name))) == 0
    magnitude, scratch, shared = rows()
    assert shared["accuracy_pruned"] == magnitude["accuracy_csb"]
    assert scratch["achieved_sparsity"] == shared["achieved_sparsity"] == magnitude["achieved_sparsity"]
    assert scratch["accuracy_pruned"] != magnitude["accuracy_pruned"]
    sizes = [int(shared[f"bytes_{name}"]) for name in ("dense", "csb", "codes", "file")]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 15 * sizes[3]
    assert "lost at 4 bits" in capsys.readouterr().out
    # On its own it has to make the net of magnitude first, and comes to the same.
    assert bench(*SMALL, "--method", pruning.SHARED) == 0
    assert without(rows()[-1], "date", "seconds") == without(shared, "date", "seconds")


def test_dry_run_lists_each_method_sparsity_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--dry-run") == 0
    said = capsys.readouterr().out
    count = len(pruning.NAMES) * 4 * 5
    assert f"{count} of {count} runs to do" in said and said.count(" % zeros, ") == count
    assert "seed 4, 98 % zeros, scratch\n" in said
    assert bench("--dry-run", "--seeds", "1", "--seed", "7", "--sparsity", "0.5", "--method", "l0") == 0
    assert "seed 7, 50 % zeros, l0\n" in capsys.readouterr().out
    assert not Path("results").exists()


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (("--method", "none"), ("--sparsity", "1.5"), ("--seeds", "0"), ("--epochs", "x")):
        with pytest.raises(SystemExit):
            bench(*bad)
    Path("results/cpu").mkdir(parents=True)
    Path("results/cpu/prune.csv").write_text("a,b\n1,2\n")
    assert bench(*SMALL, "--method", "magnitude", "--epochs", "1") == 2
    assert "other columns" in capsys.readouterr().out


def some(method: str, *accuracies: float) -> list[dict[str, str]]:
    return [
        {"method": method, "sparsity": "0.9", "accuracy_csb": str(accuracy), "seed": str(seed)}
        for seed, accuracy in enumerate(accuracies)
    ]


def test_verdicts_by_hand() -> None:
    assert prune_summary.mean_std(some("l0", 90, 92, 94), "accuracy_csb") == (92, 2)
    low = some("random", 80, 82, 84)
    # 92 - 2 is above 82 + 2; 84.5 - 0.5 is not.
    assert prune_summary.verdict(some("magnitude", 90, 92, 94), low).endswith(" random, outside the error bars")
    said = prune_summary.verdict(some("magnitude", 84, 84.5, 85), low)
    assert said == "90 %: magnitude +2.50 points over random, NOT outside the error bars"
