from __future__ import annotations

import argparse
import builtins
from pathlib import Path

import pytest

from torch_csb.bench import plot
from torch_csb.bench.report import Row, append_csv

SPARSITIES = (0.5, 0.9, 0.98)


def row(**changes: object) -> Row:
    values = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "device": "Some GPU",
        "torch": "2.11.0",
        "regime": "decode",
        "m": 64,
        "k": 128,
        "n": 8,
        "dtype": "bfloat16",
        "pattern": "uniform",
        "layout": "last",
        "sparsity": 0.9,
        "direction": "F",
        "impl": "csb",
        "us": 10.0,
        "us_spread": 0.1,
        "ratio_to_dense": 1.5,
    }
    return Row(**{**values, **changes})


def regime(patterns: tuple[str, ...] = ("uniform",)) -> list[Row]:
    return [
        row(pattern=pattern, n=n, direction=direction, m=m, sparsity=sparsity, impl=impl, ratio_to_dense=ratio / n)
        for pattern in patterns
        for n in (1, 8)
        for direction in ("F", "T")
        for m in (64, 128)
        for sparsity in SPARSITIES
        for impl, ratio in (("csb", 2.0), ("torch_csr", 0.001), ("my_kernel", 1.0), ("dense", 1.0))
    ]


def written(rows: list[Row], tmp_path: Path, name: str = "decode") -> Path:
    path = tmp_path / "results" / "some-gpu" / f"{name}.csv"
    append_csv(rows, path)
    return path


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.fixture(autouse=True)
def matplotlib(request: pytest.FixtureRequest) -> None:
    if "without_matplotlib" not in request.fixturenames:
        pytest.importorskip("matplotlib")


def test_a_regime_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "plots" / "decode.png"
    assert plot.draw_regime(written(regime(), tmp_path), picture)
    assert is_picture(picture)
    assert [path.name for path in picture.parent.iterdir()] == ["decode.png"]


def test_other_patterns_get_a_picture_of_their_own(tmp_path: Path) -> None:
    assert plot.draw_regime(written(regime(("uniform", "full_row", "powerlaw")), tmp_path), tmp_path / "decode.png")
    assert is_picture(tmp_path / "decode.png") and is_picture(tmp_path / "decode-patterns.png")


def test_a_single_row_is_drawn(tmp_path: Path) -> None:
    assert plot.draw_regime(written([row()], tmp_path), tmp_path / "one.png")
    assert is_picture(tmp_path / "one.png")


def test_the_collection_is_drawn_by_model(tmp_path: Path) -> None:
    rows = [
        row(pattern=f"dlmc:{model}/pruned/{sparsity}/layer{i}", sparsity=sparsity, n=n, ratio_to_dense=1.0 + i)
        for model, n in (("rn50", 49), ("transformer", 256))
        for sparsity in SPARSITIES
        for i in range(3)
    ]
    assert plot.draw_regime(written(rows, tmp_path, "dlmc"), tmp_path / "dlmc.png")
    assert is_picture(tmp_path / "dlmc.png")
    points = plot._points((dict(zip(vars(r), map(str, vars(r).values()), strict=True)) for r in rows), plot._model)
    assert {p.column for p in points} == {"rn50", "transformer"} and len(points) == len(rows)


def test_the_newest_row_of_a_case_wins(tmp_path: Path) -> None:
    rows = [
        row(ratio_to_dense=2.0, date="2026-02-01T00:00:00+00:00", commit="new"),
        row(ratio_to_dense=3.0, date="2026-01-01T00:00:00+00:00", commit="old"),
        row(ratio_to_dense=4.0, n=1, commit="old"),
    ]
    kept = plot.newest(plot.read_csv(written(rows, tmp_path)))
    assert [r["ratio_to_dense"] for r in kept] == ["2", "4"]
    assert plot._title("decode", kept) == "decode: Some GPU, torch 2.11.0, commit new and 1 older"


def test_the_faster_layout_counts_and_dense_is_the_line(tmp_path: Path) -> None:
    rows = [row(layout="last", ratio_to_dense=1.5), row(layout="first", ratio_to_dense=2.5), row(impl="dense")]
    points = plot._points(plot.read_csv(written(rows, tmp_path)), lambda r: int(r["n"]))
    assert [(p.line, p.ratio) for p in points] == [("csb", 2.5)]


def test_patterns_are_compared_with_the_uniform_one_of_the_same_case(tmp_path: Path) -> None:
    rows = [
        row(us=10.0),
        row(pattern="full_row", us=15.0),
        row(pattern="full_row", us=99.0, n=64),  # no uniform row beside it
        row(pattern="full_row", us=99.0, impl="dense"),
    ]
    points = plot._pattern_points(plot.read_csv(written(rows, tmp_path)))
    assert [(p.line, p.ratio) for p in points] == [("full_row", 1.5)]


def test_an_implementation_keeps_its_style() -> None:
    assert plot._styles({"csb", "torch_csr"}, plot.STYLES)["torch_csr"] == plot.STYLES["torch_csr"]
    assert list(plot._styles({"zzz", "csb", "aaa"}, plot.STYLES)) == ["csb", "aaa", "zzz"]


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written([row(ratio_to_dense=None)], tmp_path)
    assert not plot.draw_regime(path, tmp_path / "none.png")
    assert "no picture was drawn" in capsys.readouterr().out and not (tmp_path / "none.png").exists()


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def hidden(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", hidden)


def test_without_matplotlib_it_says_so(
    tmp_path: Path, without_matplotlib: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot.draw_regime(written(regime(), tmp_path), tmp_path / "decode.png") is False
    assert capsys.readouterr().out == "no picture was drawn: pip install matplotlib\n"


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    return plot.run(parser.parse_args(arguments))


def test_the_command_draws_every_regime_below_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(regime(), tmp_path)
    other = tmp_path / "results" / "some-gpu" / "model.csv"
    other.write_text("date,layer\n2026-01-01,1\n")
    plots = tmp_path / "plots"
    assert command("--results", str(tmp_path / "results"), "--plots", str(plots)) == 0
    assert [path.relative_to(plots).as_posix() for path in plots.rglob("*.png")] == ["some-gpu/decode.png"]
    capsys.readouterr()
    assert command(str(other), "--plots", str(plots)) == 0
    assert "not a timing regime's columns" in capsys.readouterr().out


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="csv: expected files, got .*nowhere.csv"):
        command(str(tmp_path / "nowhere.csv"))
