"""`bench model`: its rows, its judge, a user's model, and what it refuses. No time measured here means anything."""

from __future__ import annotations

import argparse
import csv
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_csb import autograd
from torch_csb.bench import contest, model, nets, pictures
from torch_csb.bench.model import ModelRow
from torch_csb.nn import CSBLinear, sparsify_

USER_MODULE = """
import torch
from torch import nn
from torch.nn.utils import prune

def mlp():
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96))

def pruned():
    net = mlp()
    for layer in (net[0], net[2]):
        prune.random_unstructured(layer, "weight", 0.75)
    return net

def permanently_pruned():
    net = pruned()
    prune.remove(net[0], "weight")
    return net

def one_layer():
    return nn.Linear(96, 96)

def nothing_to_convert():
    return nn.Conv2d(3, 8, 3)

def no_module():
    return 3

def pair():
    class Net(nn.Sequential):
        def forward(self, x):
            return self[0](x), x
    return Net(nn.Linear(96, 96))

not_callable = 3
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small nets, short samples, and the folder of a user's module as the current one."""
    monkeypatch.setitem(nets.NETS, "mlp", nets.Net("mlp", lambda: nets.mlp(128, 2), (128,)))
    widths = ((32, 1), (64, 2), (64, 1))
    monkeypatch.setitem(nets.NETS, "mobilenet", nets.Net("mobilenet", lambda: nets.mobilenet(widths, 10), (3, 16, 16)))
    monkeypatch.setattr(model, "SECONDS", {"cpu": 0.001, "cuda": 0.001})
    # Drawing takes longer than everything else; one test turns it on again.
    monkeypatch.setattr(pictures, "new_figure", lambda width, height: None)
    (tmp_path / "user_nets.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def bench(*arguments: str, device: str = "cpu") -> int:
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    common = ["--device", device, "--results", "results", "--plots", "plots", "--commit", "abc"]
    return model.run(parser.parse_args([*common, *arguments]))


def written() -> list[dict[str, str]]:
    files = list(Path("results").glob("*/model.csv"))
    assert len(files) == 1
    with files[0].open(newline="") as file:
        return list(csv.DictReader(file))


def check_rows(rows: list[dict[str, str]], variants: set[str]) -> None:
    assert list(rows[0]) == [field.name for field in fields(ModelRow)]
    cases: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        case = tuple(row[c] for c in ("net", "dtype", "batch", "layer"))
        cases.setdefault(case, {})[row["variant"]] = row
        assert row["commit"] == "abc" and row["sparsity"] == "0.9"
        assert float(row["us"]) > 0 and float(row["us_spread"]) >= 0 and float(row["rel_err"]) < contest.DENSE_ERROR
        assert bool(row["samples_per_s"]) == (row["layer"] == "")
        assert (row["m"] == row["k"] == row["n"] == "") == (row["layer"] == "")
    for case in cases.values():
        assert set(case) == variants
        size = {variant: int(row["weight_bytes"]) for variant, row in case.items()}
        assert size["csb"] < size["dense"] < size["masked"]
        ratio = float(case["dense"]["us"]) / float(case["csb"]["us"])
        assert float(case["csb"]["ratio_to_dense"]) == pytest.approx(ratio, rel=2e-3)


def test_rows_of_the_built_in_nets(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--batch", "3", "--batch", "1") == 0
    rows = written()
    check_rows(rows, {"dense", "masked", "csb"})
    layers = [("mlp", "0"), ("mlp", "2"), *(("mobilenet", str(i)) for i in (6, 12, 18, 23))]
    assert len(rows) == 2 * 3 * (len(layers) + 2)
    assert {(row["net"], row["layer"]) for row in rows} == {("mlp", ""), ("mobilenet", ""), *layers}
    # 16 x 16 images after a stem of stride 2 and a depthwise convolution of stride 2.
    pixels = {row["n"] for row in rows if (row["net"], row["layer"], row["batch"]) == ("mobilenet", "12", "3")}
    assert pixels == {str(3 * 4 * 4)}
    out = capsys.readouterr().out
    assert (
        "dense/csb" in out
        and "whole net" in out
        and "samples/s" in out
        and "of 6 lines" in out
        and "of 10 lines" in out
    )


def test_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    provenance = model.Provenance.of("cpu", "abc")
    series = model.Series("mlp", "float32", 0.9)
    point = {"net": "mlp", "dtype": "float32", "sparsity": "0.9", "layer": "", "variant": "dense", "batch": "8"}
    target = tmp_path / "plots" / "model.png"
    model.draw([point | {"samples_per_s": "10", "ratio_to_dense": "1"}], [series], target, provenance)
    assert target.stat().st_size > 1000


def test_a_wrong_product_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = autograd._fast_spmm
    monkeypatch.setattr(autograd, "_fast_spmm", lambda *arguments: right(*arguments) * 1.001)
    assert bench("--net", "mlp", "--batch", "1") == 1
    assert not Path("results").exists()
    out = capsys.readouterr().out
    assert "mlp, float32" in out and "csb: relative error" in out and "Nothing was written" in out


def test_a_result_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = autograd._fast_spmm
    monkeypatch.setattr(autograd, "_fast_spmm", lambda *arguments: right(*arguments) * torch.nan)
    assert bench("--net", "mlp", "--batch", "1") == 1
    assert not Path("results").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_value_off_by_one_percent_is_refused(
    dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(net: nn.Module, **options: object) -> object:
        report = sparsify_(net, **options)
        for layer in net.modules():
            if isinstance(layer, CSBLinear):
                layer.values[layer.values.abs().argmax()] *= 1.01
        return report

    monkeypatch.setattr(nets, "sparsify_", spoil)
    monkeypatch.setattr(nets, "would_convert", lambda net, device: sparsify_(net, target=device, dry_run=True))
    with pytest.warns(UserWarning, match="converted none"):
        assert bench("--net", "mlp", "--batch", "1", "--dtype", dtype) == 1
    assert not Path("results").exists()
    assert "csb" in capsys.readouterr().out


def test_a_dense_result_that_is_wrong_itself_judges_nothing() -> None:
    parts = {"dense": nn.Linear(8, 8), "csb": nn.Linear(8, 8)}
    parts["dense"].register_forward_hook(lambda layer, x, y: y + 1 if y.dtype == torch.float32 else y)
    with pytest.raises(model.WrongResult, match="here, dense: relative error"):
        contest.compare(parts, torch.randn(4, 8), "cpu", "here", 0.001)


def test_a_users_dense_model_is_pruned() -> None:
    assert bench("--model", "user_nets:mlp", "--input", "96", "--batch", "2", "--sparsity", "0.9") == 0
    rows = written()
    check_rows(rows, {"dense", "masked", "csb"})
    assert {row["net"] for row in rows} == {"user_nets:mlp"}


@pytest.mark.parametrize("function", ["pruned", "permanently_pruned"])
def test_a_users_pruned_model_stays_as_it_is(function: str) -> None:
    assert bench("--model", f"user_nets:{function}", "--input", "96", "--batch", "2") == 0
    rows = written()
    assert {row["sparsity"] for row in rows} == {"0.75"}
    assert {row["variant"] for row in rows} == {"dense", "masked", "csb"}


def test_a_model_of_one_layer() -> None:
    assert bench("--model", "user_nets:one_layer", "--input", "96", "--batch", "1") == 0
    assert {row["layer"] for row in written()} == {"", "0"}


def test_resume_skips_what_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--net", "mlp", "--resume", "--batch")
    assert bench(*arguments, "1") == 0
    before = written()
    assert bench(*arguments, "1", "--batch", "2") == 0
    after = written()
    assert after[: len(before)] == before and {row["batch"] for row in after[len(before) :]} == {"2"}
    capsys.readouterr()
    assert bench(*arguments, "2") == 0
    assert written() == after and "skipped" in capsys.readouterr().out
    assert bench(*arguments, "1", "--commit", "other") == 0
    assert len(written()) == len(after) + len(before)


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--dry-run") == 0
    assert not Path("results").exists() and not Path("plots").exists()
    out = capsys.readouterr().out
    assert "2 of 2 layers converted" in out and "not a 1x1 convolution" in out and "batch [1, 8]," in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "user_nets", "--input", "96"], "--model: expected package.module:function, got 'user_nets'"),
        (["--model", "user_nets:mlp"], "--input: expected the shape of one sample"),
        (
            ["--model", "user_nets:mlp", "--input", "3xx"],
            "--input: expected positive sizes such as 3x224x224, got '3xx'",
        ),
        (["--model", "user_nets:mlp", "--input", "0"], "--input: expected positive sizes"),
        (["--model", "user_nets:mlp", "--input", "95"], r"--input: the model refuses (1, 95)"),
        (["--model", "no_such_module:mlp", "--input", "96"], "--model: 'no_such_module' can't be imported"),
        (["--model", "user_nets:absent", "--input", "96"], "--model: expected a function 'absent' in 'user_nets'"),
        (["--model", "user_nets:not_callable", "--input", "96"], "--model: expected a function 'not_callable'"),
        (["--model", "user_nets:no_module", "--input", "96"], "to return an nn.Module, got int"),
        (["--model", "user_nets:pair", "--input", "96"], "--model: expected it to return one tensor, got tuple"),
        (["--model", "user_nets:nothing_to_convert", "--input", "3x8x8"], "sparsify_ would convert no layer"),
        (["--input", "96"], "--input: expected it beside --model only"),
        (["--sparsity", "90"], "--sparsity: expected a number between 0 and 1, got 90"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
    ],
)
def test_errors_say_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra = [] if "--batch" in arguments else ["--batch", "1"]
    assert bench(*arguments, *extra) == 2
    assert message in capsys.readouterr().out
    assert not Path("results").exists()


def test_pruning_keeps_the_largest() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(16, 30))
    weight = net[0].weight.detach().clone()
    nets.prune_by_magnitude(net, 0.9)
    mask = net[0].weight_mask.bool()
    assert mask.sum() == round(0.1 * 128) and weight[mask].abs().min() >= weight[~mask].abs().max()
    assert prune.is_pruned(net[3]) and not prune.is_pruned(net[1])


def test_calibrated_activations_do_not_vanish() -> None:
    net = nets.NETS["mobilenet"]
    pruned = nets.make_pruned(net, 0.9, "cpu").model
    features: list[Tensor] = []
    pruned[-4].register_forward_hook(lambda layer, x, y: features.append(y))
    with torch.no_grad():
        pruned(net.example(8, "cpu", torch.float32))
    assert not pruned.training and features[0].std() > 0.1


def test_variants_hold_the_same_weights() -> None:
    pruned = nets.make_pruned(nets.NETS["mlp"], 0.9, "cpu").model
    layers = nets.converted_layers(nets.would_convert(pruned, "cpu"), "mlp")
    variants = nets.make_variants(pruned, layers, "cpu")
    x = torch.randn(3, 128)
    with torch.no_grad():
        assert torch.equal(variants["dense"](x), variants["masked"](x))
    assert torch.equal(variants["csb"][0].to_dense().weight, variants["dense"][0].weight)
    assert not prune.is_pruned(variants["dense"]) and prune.is_pruned(variants["masked"])


def test_channels_last_is_a_series_of_its_own() -> None:
    assert bench("--channels-last", "--batch", "2") == 0
    rows = written()
    check_rows(rows, {"dense", "masked", "csb"})
    assert {row["net"] for row in rows} == {"mlp", "mobilenet channels_last"}


def test_a_layer_is_timed_on_what_it_gets_in_the_net() -> None:
    net = nets.mlp(64, 3).eval()
    x = torch.randn(5, 64)
    inputs = nets.layer_inputs(net, ["0", "4"], x)
    assert torch.equal(inputs["0"], x) and torch.equal(inputs["4"], net[:4](x))
    assert not any(layer._forward_pre_hooks for layer in net)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_on_cuda() -> None:
    assert bench("--batch", "2", "--dtype", "float32", device="cuda") == 0
    check_rows(written(), {"dense", "dense_tf32", "masked", "csb"})
    assert bench("--batch", "2", "--dtype", "bfloat16", device="cuda") == 0
    half = [row for row in written() if row["dtype"] == "bfloat16"]
    check_rows(half, {"dense", "masked", "csb"})
