"""`python -m torch_csb inspect`: the table's numbers, the maps, the picture, and what is said of a wrong source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import build, random_matrix
from damaged_cases import SafetensorsFile, flip, saved
from small_net import sparse_net

import torch_csb
from torch_csb import CSBLinear, CSBMatrix, save
from torch_csb.__main__ import main
from torch_csb.cli import occupancy
from torch_csb.cli.inspect import HEAD, sizes
from torch_csb.nn.report import human_bytes
from torch_csb.testing import MATRICES

MODELS = """
import torch, torch_csb
from small_net import Net, sparse_net
torch.manual_seed(3)
model = sparse_net(0.8)
dense = Net
class group:
    inner = model
number = 3
def needs(x): return model
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module that can be imported as `models_of_a_user`."""
    (tmp_path / "models_of_a_user.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "models_of_a_user"
    sys.modules.pop("models_of_a_user", None)


def run(capsys, *arguments, status=0):
    assert main(["inspect", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    return err if status else out


def rows(text):
    """The cells of each line of the table, by layer; columns stand two spaces or more apart."""
    lines = text.splitlines()
    assert tuple(part.strip() for part in lines[0].split("  ") if part.strip()) == HEAD
    table = lines[2 : 2 + next(i for i, line in enumerate(lines[2:]) if line.startswith("---"))]
    cells = [[part.strip() for part in line.split("  ") if part.strip()] for line in table]
    return {row[0]: dict(zip(HEAD, row, strict=True)) for row in cells}


@pytest.mark.parametrize("case", MATRICES, ids=str)
@pytest.mark.parametrize("block_size", [16, 64, "bitmap"])
def test_the_bytes_add_up_to_what_the_matrix_holds(case, block_size):
    w = build(case, block_size=block_size)
    size = sizes(w)
    assert sum(size[part] for part in ("values", "indices", "padding", "plan")) == w.nbytes
    assert size["values"] == 4 * w.nnz and size["padding"] == (4 if block_size == "bitmap" else 6) * (
        w.values.numel() - w.nnz
    )
    assert size["dense"] == 4 * w.m * w.k
    csr = w.to_csr()
    assert size["csr"] == 4 * (csr.values().numel() + csr.col_indices().numel() + csr.crow_indices().numel())


def test_the_table_of_a_file(tmp_path, capsys):
    path, model = tmp_path / "model.safetensors", sparse_net(0.8)
    save(model, path)
    found = rows(run(capsys, path))
    assert set(found) == {"conv", "fc"}, "a shared layer stands there once"
    for name, row in found.items():
        w = getattr(model, name).matrix
        assert row["shape"] == f"{w.m}x{w.k}" and row["nnz"] == f"{w.nnz:,}" and row["block"] == str(w.block_size)
        assert row["zeros"] == f"{100 * w.sparsity:.2f} %" and row["dtype"] == "float32" and row["encoding"] == "codes"
        assert row["in all"] == human_bytes(w.nbytes)
        assert row["of dense"] == f"{100 * w.nbytes / (4 * w.m * w.k):.1f} %"
        assert row["plan"].startswith(human_bytes(4 * w.units.numel()))


def test_a_model_is_found_by_its_import_path(tmp_path, models, capsys):
    tables = [run(capsys, f"{models}:{name}") for name in ("model", "group.inner")]
    assert tables[0] == tables[1]
    module = sys.modules[models]
    save(module.model, tmp_path / "model.safetensors")
    assert rows(run(capsys, tmp_path / "model.safetensors")) == rows(tables[0])
    assert "no CSB layer" in run(capsys, f"{models}:dense") and "convert" in run(capsys, f"{models}:dense")


@pytest.mark.parametrize(
    "source, message",
    [
        ("{models}:absent", "models_of_a_user has no 'absent'; expected package.module:name"),
        ("{models}:number", "expected an nn.Module or a callable that returns one, got int"),
        ("{models}:needs", "expected a callable that needs no arguments: needs"),
        ("no_such_package.part:model", "no module 'no_such_package'; start where Python can import it"),
        ("nowhere.safetensors", "nowhere.safetensors: no such file (a model is named as package.module:name)"),
        ("{folder}", "no such file"),
    ],
)
def test_a_source_that_is_none_is_refused_with_what_to_do(models, tmp_path, capsys, source, message):
    assert message in run(capsys, source.format(models=models, folder=tmp_path), status=1)


def test_a_damaged_file_is_refused_by_name(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    file = SafetensorsFile(saved(sparse_net(0.8), path))
    path.write_bytes(flip(file.data, 8 * file.span("fc.codes")[0]))
    assert run(capsys, path, status=1).startswith(f"error: {path}: fc.codes: expected crc32")
    file = SafetensorsFile(saved(sparse_net(0.8), path, checksums=False))
    path.write_bytes(flip(file.data, 8 * file.span("fc.blk_ptr")[0]))
    assert run(capsys, path, status=1).startswith(f"error: {path}: fc.blk_ptr: invariant 2")


def test_what_a_file_does_not_tell_is_said(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(sparse_net().state_dict(), path)
    said = run(capsys, path)
    assert "no shape is known of conv, fc, again.0" in said and "torch_csb.save" in said
    assert "there is no layer of known shape" in run(capsys, path, "--picture", tmp_path / "a.png", status=1)


def test_layers_are_chosen(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save(sparse_net(), path)
    assert set(rows(run(capsys, path, "--layers", "c*"))) == {"conv"}
    assert "--layers x*: matches none of conv, fc" in run(capsys, path, "--layers", "x*", status=1)
    assert "@" in run(capsys, path) and "@" not in run(capsys, path, "--no-maps")


def test_a_single_layer_is_a_model_too(tmp_path, capsys):
    path = tmp_path / "layer.safetensors"
    save(CSBLinear(random_matrix(70, 90, 0.9)), path)
    assert rows(run(capsys, path))["(model)"]["shape"] == "70x90"


@pytest.mark.parametrize("m, k, block_size", [(100, 70, 16), (33, 17, 16), (300, 500, 64), (1, 1, 256)])
def test_the_share_of_a_block_counts_the_elements_that_it_has(m, k, block_size):
    w = random_matrix(m, k, 0.7, block_size=block_size)
    kept = w.to_dense() != 0
    shares = occupancy.shares(w)
    for i in range(shares.shape[0]):
        for j in range(shares.shape[1]):
            block = kept[i * block_size : (i + 1) * block_size, j * block_size : (j + 1) * block_size]
            assert shares[i, j].item() == pytest.approx(block.double().mean().item())
    assert occupancy.shares(w, 1, 1).item() == pytest.approx(1 - w.sparsity)


def test_the_map_shows_empty_blocks_and_the_fullest():
    weight = torch.zeros(64, 96)
    weight[:16, :16] = 1
    weight[48:, 80] = 1
    lines = occupancy.text_map(CSBMatrix.from_dense(weight, block_size=16))
    assert lines[0] == "|@@          |" and lines[1] == lines[2] == "|            |"
    assert lines[3] == "|          ..|" and lines[4].startswith("'@' is 100 % of the elements stored")


@pytest.mark.parametrize("m, k", [(5000, 5000), (16, 9000), (9000, 16), (40, 40), (0, 10), (64, 64)])
def test_a_map_fits_the_terminal(m, k):
    w = CSBMatrix.from_dense((torch.rand(m, k) < 0.01).float(), block_size=16)
    *lines, legend = occupancy.text_map(w)
    assert len(lines) <= 16 and all(len(line) <= 66 and len(line) == len(lines[0]) for line in lines)
    assert legend == "(no block)" or bool(lines)


def test_a_map_of_an_empty_matrix_says_so():
    assert occupancy.text_map(CSBMatrix.from_dense(torch.zeros(20, 20), block_size=16))[-1] == "no element is stored"


def test_the_picture_has_a_panel_for_each_layer_and_a_cell_for_each_block(tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="the picture is drawn with matplotlib")
    drawn, save_figure = [], figure.Figure.savefig

    def remember(self, *arguments, **keywords):
        drawn.append(self)
        return save_figure(self, *arguments, **keywords)

    monkeypatch.setattr(figure.Figure, "savefig", remember)
    path, picture, model = tmp_path / "model.safetensors", tmp_path / "deep" / "a.png", sparse_net(0.9)
    save(model, path)
    assert f"drawn: {picture}" in run(capsys, path, "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    images = {axes.get_title().split("\n")[0]: axes.images[0] for axes in drawn[0].axes if axes.images}
    for name in ("conv", "fc"):
        expected = 100 * occupancy.shares(getattr(model, name).matrix)
        assert torch.equal(torch.from_numpy(images[name].get_array().data), expected)


def test_a_picture_without_matplotlib_says_what_to_do(tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(sparse_net(), path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in run(capsys, path, "--picture", tmp_path / "a.png", status=1)


def test_the_command_ends_with_its_status():
    package = str(Path(torch_csb.__file__).resolve().parents[1])
    command = [sys.executable, "-m", "torch_csb", "inspect", "nowhere"]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: nowhere: no such file") and not done.stdout


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    save(sparse_net(), tmp_path / "model.safetensors")
    command = [sys.executable, "-m", "torch_csb", "inspect", str(tmp_path / "model.safetensors")]
    package = Path(torch_csb.__file__).resolve().parents[1]
    done = subprocess.Popen(command, cwd=package, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()  # as head does, here before the first line
    assert done.stderr.read() == "" and done.wait() == 1
    done.stderr.close()


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "a", "b"], ["convert", "a"], ["look"], []])
def test_a_wrong_command_line_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: python -m torch_csb" in capsys.readouterr().err
