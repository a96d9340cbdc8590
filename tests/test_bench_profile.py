from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from torch_csb import CSBMatrix
from torch_csb.bench import wavefronts

pytest.importorskip("torch_csb._plan", reason="the planner module is not built")

from torch_csb.bench import limits, profile, sweep, timing  # noqa: E402


def packed(mask: torch.Tensor, dtype: torch.dtype, block_size: int = 64) -> CSBMatrix:
    return CSBMatrix.from_dense(torch.randn(mask.shape).to(dtype), mask, block_size=block_size)


def one_row(dtype: torch.dtype) -> CSBMatrix:
    """A 64 x 64 block whose row 0 is full: entry c has code c."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[0] = True
    return packed(mask, dtype)


def one_column(dtype: torch.dtype) -> CSBMatrix:
    """A 64 x 64 block whose column 0 is full: entry r has code 64 r + 8 (r % 8)."""
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 0] = True
    return packed(mask, dtype)


def test_wavefronts_are_the_most_distinct_words_of_a_bank() -> None:
    lanes = torch.arange(32)
    accesses = torch.stack([lanes, lanes * 0, lanes * 32, lanes * 2, lanes.clamp_max(0) - 1])
    assert wavefronts.wavefronts(accesses).tolist() == [1, 1, 32, 2, 0]
    assert wavefronts.wavefronts(accesses, atomic=True).tolist() == [1, 32, 32, 2, 0]


def test_tile_kernel_of_one_full_row_has_no_conflicts() -> None:
    found = wavefronts.count(one_row(torch.bfloat16), 8, "F", "tile", 8, False)
    assert found == {
        "copy codes and values in": 2,  # 16 vectors of 8 bytes, twice
        "read codes and values": 3,  # and the codes once more to undo
        "scatter into the tile": 4,  # store i: words 2 l + i / 2 of 16 lanes l
        "clean the tile": 4,
        "clear tiles at the start": 192,
        "copy X in": 8,
        "ldmatrix of W": 64,
        "ldmatrix of X": 32,  # four warps read all of it
    }
    assert wavefronts.count(one_row(torch.bfloat16), 9, "F", "tile", 8, False) == {k: 2 * v for k, v in found.items()}


def test_tile_kernel_of_one_full_column_conflicts() -> None:
    """Lane l of store i has row 4 l + i, in bank 4 (row % 8): two banks for 16 lanes."""
    found = wavefronts.count(one_column(torch.bfloat16), 8, "T", "tile", 8, True)
    assert found["scatter into the tile"] == found["clean the tile"] == 4 * 8


def test_tile_kernel_undoes_padding_too_and_clears_full_tiles() -> None:
    single = torch.zeros(64, 64, dtype=torch.bool)
    single[0, 0] = True
    found = wavefronts.count(packed(single, torch.float16), 1, "F", "tile", 8, False)
    assert (found["scatter into the tile"], found["clean the tile"]) == (1, 4)

    full = packed(torch.ones(64, 64, dtype=torch.bool), torch.float16)
    found = wavefronts.count(full, 1, "F", "tile", 8, False)
    assert found["clean the tile"] == 4 * 64  # four steps of 1024 entries
    assert found["copy X in"] == 4 * 8
    # 32 groups of two rows, whose halves of every store lie in the same 16 banks
    assert found["scatter into the tile"] == 32 * 4 * 2


def test_gather_kernel_of_one_full_row() -> None:
    found = wavefronts.count(one_row(torch.float32), 1, "F", "gather", 1, False)
    assert found == {
        "mark entries": 64,  # the 32 lanes of an access set bits of one word
        "sort entries": 2 * (1 + 2) + 4 + 32,
        "write the X panel": 2,
        "read entries": 16,  # four splits share the row
        "read X rows": 16,
        "results": 2 + 2,
    }
    wide = wavefronts.count(one_row(torch.float32), 128, "F", "gather", 128, False)
    assert (wide["read entries"], wide["read X rows"]) == (64, 4 * 64)  # an entry and 512 bytes at a time


def test_gather_kernel_of_one_full_row_transposed() -> None:
    found = wavefronts.count(one_row(torch.float32), 1, "T", "gather", 1, False)
    assert found["mark entries"] == 2 * 2  # words 0, 2, ... 62: two of a bank
    assert found["sort entries"] == 2 * (2 + 2) + 4 + 32
    assert found["read entries"] == found["read X rows"] == 8  # each warp has 8 outputs, all of the same input


@pytest.mark.parametrize("transposed", [False, True])
def test_gather_reads_equal_a_walk_of_the_kernels_loops(transposed: bool) -> None:
    """n = 8 in float32: 2 lanes of 4 columns, 2 splits, one output a group, pitch 12; several windows of 1024."""
    mask = torch.rand(64, 64) < 0.6
    found = wavefronts.count(packed(mask, torch.float32), 8, "T" if transposed else "F", "gather", 8, False)
    outputs = [row.nonzero().flatten().tolist() for row in (mask.t() if transposed else mask)]
    starts = [sum(map(len, outputs[:out])) for out in range(65)]
    entries = x_rows = 0
    for window in range(0, starts[-1], 1024):
        for warp in range(8):
            first = [max(starts[8 * warp + g] - window, 0) for g in range(8)]
            end = [min(starts[8 * warp + g + 1] - window, 1024) for g in range(8)]
            for turn in range(32):
                at = [(g, first[g] + s + 2 * turn) for g in range(8) for s in range(2)]
                at = [(g, e) for g, e in at if e < end[g]]
                inner = [outputs[8 * warp + g][e + window - starts[8 * warp + g]] for g, e in at]
                entries += most_in_a_bank({2 * e + half for _, e in at for half in range(2)})
                x_rows += most_in_a_bank({12 * i + word for i in inner for word in range(8)})
    assert (found["read entries"], found["read X rows"]) == (entries, x_rows)


def most_in_a_bank(words: set[int]) -> int:
    return max([sum(word % 32 == bank for word in words) for bank in range(32)])


def test_sddmm_tile_kernel_loads_only_strips_that_it_needs() -> None:
    mask = torch.zeros(64, 192, dtype=torch.bool)
    mask[0, :64] = True
    found = wavefronts.count(packed(mask, torch.bfloat16), 65, "dW", "tile", 64, 3)
    assert found == {
        "copy A and B in": 2 * 128,  # two steps of 64 columns
        "ldmatrix of A and B": 2 * 128,
        "store the dense block": 3 * 128,
        "sample it": 3 * 8 * 2,  # store i: words 8 l + i of 8 lanes, two of a bank
    }


def test_sddmm_gather_kernel_of_one_full_row() -> None:
    found = wavefronts.count(one_row(torch.float32), 64, "dW", "gather", 32, 1)
    assert found == {
        "list entries": 4 + 2 * 16,
        "write the panels of A and B": 2 * 128,
        "read rows of A": 2 * 8,  # the row stays the same, so it is read once a warp
        "read rows of B": 2 * 16 * 4,  # four groups, four rows
    }


def test_sampled_blocks_stand_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    w = packed(torch.rand(512, 512) < 0.1, torch.bfloat16)
    whole = wavefronts.count(w, 8, "F", "tile", 8, False)
    monkeypatch.setattr(wavefronts, "SAMPLED", 4000)
    part = wavefronts.count(w, 8, "F", "tile", 8, False)
    assert part["ldmatrix of W"] == whole["ldmatrix of W"]
    assert part["scatter into the tile"] == pytest.approx(whole["scatter into the tile"], rel=0.1)


def test_units_write_whole_strips_and_shares() -> None:
    w = packed(torch.rand(640, 1024) < 0.5, torch.float32)
    assert wavefronts.flushes(w, False, True) == (16, 16, 0)
    thread_blocks, outputs, partials = wavefronts.flushes(w, True, False)
    begin = w.units[0].tolist()
    touched = [(u, p // 16) for u in range(len(begin) - 1) for p in range(begin[u], begin[u + 1])]
    assert thread_blocks == len({u for u, _ in touched})
    shared = [strip for strip in range(10) if len({u for u, s in set(touched) if s == strip}) > 1]
    assert outputs == 10 - len(shared) and outputs + partials == len(set(touched))


def test_an_empty_matrix_costs_no_steps() -> None:
    w = packed(torch.zeros(128, 128, dtype=torch.bool), torch.float32)
    assert wavefronts.count(w, 8, "F", "gather", 8, False)["read X rows"] == 0
    assert wavefronts.count(w, 8, "dW", "gather", 32, 1)["list entries"] == 0


def test_wavefronts_are_those_of_cuda_kernels() -> None:
    with pytest.raises(ValueError, match="'gather' or 'tile', got 'cpu'"):
        wavefronts.count(one_row(torch.float32), 8, "F", "cpu", 8, False)
    with pytest.raises(ValueError, match="at most 64 .* got 256"):
        wavefronts.count(packed(torch.eye(256) > 0, torch.float32, 256), 8, "F", "gather", 8, False)


def test_bytes_are_the_matrix_and_the_activations() -> None:
    w = packed(torch.rand(300, 500) < 0.1, torch.bfloat16)
    found = profile.array_bytes(w, 7, 96)
    assert sum(list(found.values())[:5]) == w.nbytes
    assert list(found.items())[5:] == [("X", 500 * 7 * 2), ("Y", 300 * 7 * 2), ("partials", 96)]


def step(kernel: str, split: bool | int, tile_n: int = 8):
    return argparse.Namespace(kernel=kernel, split=split, tile_n=tile_n)


def test_imbalance_counts_only_while_the_chip_waits() -> None:
    mask = torch.zeros(640, 640, dtype=torch.bool)
    mask[5] = True
    w = packed(mask, torch.float32)
    assert profile.imbalance(w, "F", step("gather", False), 100, 8) == 10  # one strip of ten has everything
    assert profile.imbalance(w, "F", step("gather", False), 2, 800) == 1
    assert profile.imbalance(w, "T", step("gather", False), 100, 8) == 1
    assert profile.imbalance(w, "F", step("gather", False), 1, 8) == 1


def test_tensor_cores_multiply_whole_blocks() -> None:
    w = one_row(torch.bfloat16)
    assert profile.flops_done(w, 5, step("tile", False)) == 2 * 64 * 64 * 8
    assert profile.flops_done(w, 5, step("gather", False)) == 2 * 64 * 8
    assert profile.flops_done(w, 5, step("cpu", False)) == 2 * 64 * 5


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command quickly; its status, what it printed and its numbers."""
    quick = lambda device, calls, budget_s, judge: timing.time_all(device, calls, 0.02, judge)  # noqa: E731
    monkeypatch.setattr(sweep, "time_all", quick)
    known = dict.fromkeys(("float64", "float32", "bfloat16", "float16"), 1e11)
    monkeypatch.setattr(limits, "measure_limits", lambda device, dtypes: limits.Limits(1e10, known))

    def call(*arguments: str) -> tuple[int, str, dict]:
        parser = argparse.ArgumentParser()
        profile.add_arguments(parser)
        numbers = tmp_path / "numbers.json"
        where = ["--plots", str(tmp_path), "--json", str(numbers), "--commit", "abc"]
        status = profile.run(parser.parse_args([*arguments, *where]))
        return status, capsys.readouterr().out, json.loads(numbers.read_text())

    return call


@pytest.mark.parametrize("direction", ["F", "T", "dW"])
def test_the_command_prints_its_sections(direction: str, run, tmp_path: Path) -> None:
    arguments = ["--shape", "300x520", "--sparsity", "0.8", "--dtype", "float32", "--n", "5", "--device", "cpu"]
    status, text, found = run(*arguments, "--direction", direction)
    assert status == 0
    for part in ("300 x 520", "kernel    cpu", "bytes", "blk_pad", "blocks ", "units ", "dense", "bound by "):
        assert part in text
    assert "wavefronts" not in text
    assert found["bound_by"] in found["times_us"] and found["rel_err"]["csb"] < 1e-5
    assert sum(found["bytes"].values()) > 0 and found["commit"] == "abc"
    if find_spec("matplotlib"):
        (picture,) = tmp_path.glob(f"*/profile-300x520-uniform-0.8-float32-n5-{direction}.png")
        assert picture.stat().st_size > 10_000


def test_a_full_row_makes_uneven_units(run) -> None:
    arguments = ["--shape", "700x2100", "--pattern", "full_row", "--sparsity", "0.99", "--n", "1", "--device", "cpu"]
    _, _, found = run(*arguments)
    assert found["units"]["row-major"]["max_over_mean"] > 1
    assert found["blocks"]["max"] > found["blocks"]["mean"]


def test_a_file_gives_the_pattern(run, tmp_path: Path) -> None:
    file = tmp_path / "layer.smtx"
    file.write_text("3, 4, 2\n0 1 1 2\n3 0\n")
    _, text, found = run("--smtx", str(file), "--n", "2", "--device", "cpu")
    assert (found["m"], found["k"], found["nnz"]) == (3, 4, 2) and "layer" in text


def test_nonzeros_of_regions_of_four_by_four_blocks() -> None:
    mask = torch.zeros(300, 600, dtype=torch.bool)
    mask[0, :10] = mask[255, 256:261] = mask[256, 511] = mask[299, 599] = True
    assert profile.region_nonzeros(packed(mask, torch.float32)).tolist() == [10, 5, 0, 0, 1, 1]


def test_nothing_to_profile_is_said(run, tmp_path: Path) -> None:
    file = tmp_path / "empty.smtx"
    file.write_text("3, 4, 0\n0 0 0 0\n\n")
    with pytest.raises(ValueError, match="at least one nonzero"):
        run("--smtx", str(file), "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096"], "expected rows x columns such as 4096x4096, got '4096'"),
        (["--shape", "0x5"], "expected rows x columns"),
        (["--sparsity", "90"], "expected a fraction from 0 to below 1, such as 0.9, got '90'"),
        (["--n", "0"], "expected a whole number of at least 1, got '0'"),
        (["--smtx", "nowhere.smtx"], "expected a file, got 'nowhere.smtx'"),
        (["--direction", "B"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("dtype", "direction", "n", "counted"),
    [
        ("float32", "T", 8, False),
        ("bfloat16", "dW", 64, True),
        ("float64", "dW", 64, True),
        ("float32", "dW", 64, False),
        ("bfloat16", "F", 1, False),
        ("bfloat16", "T", 8, False),
        ("bfloat16", "F", 64, False),
        ("float32", "F", 64, False),
        ("float32", "F", 512, False),
    ],
)
def test_wavefronts_on_a_gpu(dtype: str, direction: str, n: int, counted: bool, run) -> None:
    arguments = ["--shape", "1024x2048", "--dtype", dtype, "--direction", direction, "--n", str(n), "--device", "cuda"]
    _, text, found = run(*arguments)
    if not counted:
        assert "not counted for the kernel" in text and "wavefronts" not in found
        return
    assert "shared-memory wavefronts" in text
    assert found["wavefronts"] and found["times_us"]["shared memory"] > 0
