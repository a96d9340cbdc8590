"""`python -m torch_csb convert`: which weights of a checkpoint become CSB layers, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from torch_csb import CSBConv2d, CSBLinear, load_into, save, sparsify_
from torch_csb.__main__ import main


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 64, dtype=dtype)
        self.fc = nn.Linear(64, 96, dtype=dtype)
        self.out = nn.Linear(96, 50, bias=False, dtype=dtype)
        self.conv = nn.Conv2d(32, 48, 1, dtype=dtype)
        self.wide = nn.Conv2d(4, 4, 3, dtype=dtype)
        self.attention = nn.MultiheadAttention(64, 2, dtype=dtype)

    def forward(self, ids):
        return self.out(self.fc(self.embed_tokens(ids)).relu())


def pruned(dtype=torch.float32, masks=True):
    model = Model(dtype)
    for layer in (model.fc, model.conv):
        prune.random_unstructured(layer, "weight", 0.9)
        if not masks:
            prune.remove(layer, "weight")
    return model.eval()


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "in.pt", tmp_path / "out.safetensors"


def run(capsys, *arguments, status=0):
    assert main(["convert", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    return out, err


def reasons(table):
    """What the report says of each weight: the last columns of its line."""
    lines = table.splitlines()
    table = lines[2 : 2 + next(i for i, line in enumerate(lines[2:]) if line.startswith("---"))]
    found = {}
    for line in table:
        name, rest = line.split(maxsplit=1)
        found[name] = rest.partition(" kept ")[2].strip() if " kept " in rest else "converted"
    return found


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("masks", [True, False])
def test_a_converted_checkpoint_loads_and_computes_the_same(tmp_path, capsys, kind, masks):
    source, out, model = tmp_path / f"in.{kind}", tmp_path / "out.safetensors", pruned(masks=masks)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, source) if kind == "pt" else save_file(state, source)
    said = reasons(run(capsys, source, out)[0])
    assert {name for name, reason in said.items() if reason == "converted"} == {"fc.weight", "conv.weight"}
    loaded = Model().eval()
    assert load_into(loaded, out) == ([], [])
    assert type(loaded.fc) is CSBLinear and type(loaded.conv) is CSBConv2d and type(loaded.out) is nn.Linear
    assert torch.equal(loaded.fc.to_dense().weight, model.fc.weight)
    assert torch.equal(loaded.conv.to_dense().weight, model.conv.weight)
    ids = torch.arange(7)
    torch.testing.assert_close(loaded(ids), model(ids))
    assert out.stat().st_size < source.stat().st_size


def test_every_weight_that_stays_dense_is_named_with_its_reason(paths, capsys):
    source, out = paths
    state = pruned().state_dict()
    zeros = torch.zeros(64, 64)
    state["head.weight"] = state["embed_tokens.weight"]
    state["codes8.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    state["conv1d.weight"] = torch.zeros(64, 64, 1)
    state["lookup.wte.weight"] = zeros
    state["kept.weight"] = zeros.clone()
    torch.save(state, source)
    said = reasons(run(capsys, source, out, "--exclude", "kept")[0])
    for name, reason in {
        "embed_tokens.weight": "tied weight: stored as embed_tokens.weight and head.weight",
        "head.weight": "tied weight: stored as embed_tokens.weight and head.weight",
        "lookup.wte.weight": "an embedding by its name",
        "out.weight": "too dense: 0.0 % zeros, 50 % are asked for",
        "wide.weight": "not a 1x1 convolution: its kernel is 3x3",
        "attention.in_proj_weight": "not a layer's weight",
        "attention.out_proj.weight": "part of MultiheadAttention",
        "codes8.weight": "unsupported weight: torch.int8",
        "conv1d.weight": "neither a matrix nor a 1x1 kernel: it has 3 dimensions",
        "kept.weight": "excluded",
        "fc.weight": "converted",
        "conv.weight": "converted",
    }.items():
        assert said.pop(name).startswith(reason), name
    assert not said
    kept = load_file(out)
    assert torch.equal(kept["kept.weight"], zeros) and torch.equal(kept["wide.weight"], state["wide.weight"])
    assert kept.keys() >= {"fc.codes", "fc.bias"} and kept.keys().isdisjoint({"fc.weight", "fc.weight_mask"})


def test_include_overrules_names_and_ties(paths, capsys):
    source, out = paths
    weight = torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)
    torch.save({"a.weight": weight, "b.weight": weight, "wte.weight": weight.clone()}, source)
    run(capsys, source, out, status=1)
    run(capsys, source, out, "--include", "[ab]")
    shared = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "wte": nn.Embedding(64, 64)})
    shared["b"] = shared["a"]
    load_into(shared, out)
    assert type(shared["a"]) is CSBLinear and shared["b"] is shared["a"]
    assert torch.equal(shared["a"].to_dense().weight, weight)


def test_a_pruned_layer_that_stays_dense_loses_its_mask_and_keeps_its_zeros(paths, capsys):
    source, out = paths
    model = pruned()
    prune.random_unstructured(model.out, "weight", 0.3)
    prune.random_unstructured(model.fc, "bias", 0.5)
    torch.save(model.state_dict(), source)
    assert reasons(run(capsys, source, out)[0])["out.weight"].startswith("too dense: 30.0 % zeros")
    loaded = Model()
    load_into(loaded, out)
    assert torch.equal(loaded.out.weight, model.out.weight) and torch.equal(loaded.fc.bias, model.fc.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(paths, capsys, dtype):
    source, out = paths
    model = pruned(dtype)
    torch.save(model.state_dict(), source)
    run(capsys, source, out)
    loaded = Model(dtype)
    load_into(loaded, out)
    assert loaded.fc.values.dtype == dtype and torch.equal(loaded.fc.to_dense().weight, model.fc.weight)


def test_the_asked_sparsity_decides(paths, capsys):
    source, out = paths
    torch.save(pruned(masks=False).state_dict(), source)
    text, error = run(capsys, source, out, "--min-sparsity", "0.95", status=1)
    assert "too dense: 90.0 % zeros, 95 % are asked for" in text and not out.exists()
    assert "nothing to convert, so nothing is written" in error and "--min-sparsity" in error
    said = reasons(run(capsys, source, out, "--min-sparsity", "0")[0])
    assert said["out.weight"] == "converted", "asked for, also where it is larger than dense"


def test_a_batch_keeps_what_would_be_faster_dense(paths, capsys):
    source, out = paths
    torch.save(pruned(masks=False).state_dict(), source)
    text, _ = run(capsys, source, out, "--batch", "64", "--target", "cuda", status=1)
    assert "faster dense: 90.0 % zeros, 64 columns, on a GPU" in text and not out.exists()
    said = reasons(run(capsys, source, out, "--batch", "64", "--target", "cpu")[0])
    assert said["fc.weight"] == said["conv.weight"] == "converted"


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "many"])
def test_a_batch_that_is_none_is_a_usage_error(paths, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, paths), "--batch", wrong])
    assert stop.value.code == 2 and "expected a number of columns, at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["1.5", "-0.1", "half", "nan"])
def test_a_sparsity_that_is_none_is_a_usage_error(paths, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, paths), "--min-sparsity", wrong])
    assert stop.value.code == 2 and "expected 'auto' or a number from 0 to 1" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_tells_the_sizes(paths, capsys):
    source, out = paths
    torch.save(pruned().state_dict(), source)
    text, _ = run(capsys, source, out, "--dry-run")
    assert "nothing is written" in text and "would take about" in text and list(out.parent.iterdir()) == [source]
    assert reasons(text) == reasons(run(capsys, source, out)[0])
    before = out.read_bytes()
    text, _ = run(capsys, source, out, "--dry-run")
    assert "--force would be needed" in text and out.read_bytes() == before


def test_a_file_is_replaced_only_when_asked(paths, capsys):
    source, out = paths
    torch.save(pruned().state_dict(), source)
    out.write_text("precious")
    assert "exists already; --force replaces it" in run(capsys, source, out, status=1)[1]
    assert out.read_text() == "precious"
    run(capsys, source, out, "--force")
    load_into(Model(), out)
    run(capsys, source, source, status=1)
    assert torch.load(source, weights_only=True).keys() == pruned().state_dict().keys()


def test_a_failure_leaves_the_old_file(paths, capsys):
    source, out = paths
    out.write_text("precious")
    source.write_bytes(b"PK\x03\x04 no archive")
    _, error = run(capsys, source, out, "--force", status=1)
    assert error.startswith(f"error: {source}: not a complete file of torch.save") and out.read_text() == "precious"


def test_code_in_a_checkpoint_is_not_run(paths, capsys):
    source, out = paths
    torch.save(pruned(), source)
    _, error = run(capsys, source, out, status=1)
    assert "not a checkpoint of tensors alone" in error and not out.exists()
    torch.save({"epoch": 1, "state_dict": pruned().state_dict()}, source)
    assert "an object that holds others: 'state_dict'" in run(capsys, source, out, status=1)[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere.pt", "{out}"), "nowhere.pt: no such file"),
        (("{source}", "{folder}/none/out.safetensors"), "there is no folder"),
        (("{source}", "{folder}", "--force"), "expected a file to write, got a folder"),
        (("{source}", "{out}", "--include", "fx"), "--include fx: matches no layer of the checkpoint"),
        (("{source}", "{out}", "--exclude", "a.*"), "--exclude a.*: matches no layer of the checkpoint"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(paths, tmp_path, capsys, arguments, message):
    source, out = paths
    torch.save(pruned().state_dict(), source)
    where = {"source": source, "out": out, "folder": tmp_path}
    _, error = run(capsys, *(part.format(**where) for part in arguments), status=1)
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1 and not out.exists()


def test_layers_that_are_compressed_already_pass_through(paths, capsys):
    source, out = paths
    model = pruned(masks=False)
    sparsify_(model)
    source = source.with_suffix(".safetensors")
    save(model, source, metadata={"epoch": "3"})
    text, error = run(capsys, source, out, status=1)
    assert "compressed already: conv, fc" in text and "nothing to convert" in error
    model.out.weight.data *= torch.rand_like(model.out.weight) < 0.1
    save(model, source, metadata={"epoch": "3"})
    run(capsys, source, out)
    loaded = Model()
    load_into(loaded, out)
    assert torch.equal(loaded.fc.values, model.fc.values) and type(loaded.out) is CSBLinear
    assert main(["inspect", str(out), "--no-maps"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]} == {"conv", "fc", "out"}


def test_a_target_chooses_the_block_size(paths, capsys):
    source, out = paths
    torch.save(pruned().state_dict(), source)
    for target, block_size in (("cpu", 256), ("cuda", 64)):
        run(capsys, source, out, "--target", target, "--force")
        assert load_file(out)["fc.layout"].tolist()[1] == block_size
