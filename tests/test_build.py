"""The build and the tools around it: what `info` says, what a machine that lacks something is told, the GPU record."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import torch_csb
from tools import tool
from torch_csb import _load

ROOT = Path(__file__).resolve().parent.parent


def run(
    *arguments: str | Path, cwd: Path = ROOT, python_path: tuple[Path, ...] = (ROOT,), **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = [*map(str, python_path), os.environ.get("PYTHONPATH", "")]
    full = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=full, capture_output=True, text=True)


def test_info_prints_versions_and_gaps() -> None:
    done = run("-m", "torch_csb", "info")
    assert done.returncode == 0, done.stderr
    rows = {line[:13].strip(): line[13:].strip() for line in done.stdout.splitlines()}
    assert rows["torch_csb"] == torch_csb.__version__
    assert rows["torch"].split()[0] == torch.__version__
    assert rows["operators"].startswith("_C.abi3")
    assert {"python", "CUDA kernels", "GPUs", "planner", "missing"} <= set(rows)
    print(done.stdout)


def test_build_info_agrees_with_torch() -> None:
    info = torch_csb.build_info()
    assert len(info.gpus) == torch.cuda.device_count()
    assert (info.cuda is None) == (not info.archs)
    assert info.cpu in {"default", "avx2", "avx512"}
    says_not_built = any("were not built" in sentence for sentence in info.missing)
    assert says_not_built == (info.cuda is None and torch.version.cuda is not None)


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("c++filt") is None, reason="needs binutils")
def test_operators_use_the_stable_abi_alone() -> None:
    """A C++ symbol of torch would tie the library to one version of it, a symbol of Python to one Python."""
    symbols = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", _load.library_path()], capture_output=True, text=True, check=True
    ).stdout
    names = subprocess.run(["c++filt"], input=symbols, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch" in names
    foreign = [line for line in names.splitlines() if any(part in line for part in ("c10::", "at::", "torch::", " Py"))]
    assert not foreign, "\n".join(foreign)


def test_package_works_without_the_planner_module() -> None:
    code = (
        "import sys; sys.modules['torch_csb._plan'] = None\n"
        "import torch, torch_csb\n"
        "w = torch_csb.CSBMatrix.from_dense(torch.eye(64))\n"
        "assert torch.equal(w @ torch.ones(64, 3), torch.ones(64, 3))\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_import_without_the_library_says_what_to_do(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "torch_csb", tmp_path / "torch_csb", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = run("-c", "import torch_csb", cwd=tmp_path, python_path=(tmp_path,))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "make" in last and "pip install --no-build-isolation ." in last


FAKE_TORCH = "class version:\n    cuda = None\n    hip = {hip!r}\n__version__ = {version!r}\n"


@pytest.mark.parametrize(
    ("torch_source", "expected"),
    [
        ("raise ImportError", "install torch 2.11 or newer"),
        (FAKE_TORCH.format(hip=None, version="2.10.1+cpu"), "2.11 or newer, got 2.10.1+cpu"),
        (FAKE_TORCH.format(hip="6.4", version="2.13.0"), "install a CPU or CUDA build"),
    ],
    ids=["missing", "too old", "ROCm"],
)
def test_build_against_a_wrong_torch_says_what_to_do(tmp_path: Path, torch_source: str, expected: str) -> None:
    (tmp_path / "torch" / "utils").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text(torch_source)
    (tmp_path / "torch" / "utils" / "__init__.py").write_text("")
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text("")
    command = ("setup.py", "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    done = run(*command, python_path=(tmp_path,))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and expected in last


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TORCH_CSB_CUDA": "yes"}, "expected TORCH_CSB_CUDA to be auto, 0 or 1, got 'yes'"),
        ({"TORCH_CSB_CUDA": "1", "CUDA_HOME": "nowhere"}, "install one or point CUDA_HOME at it"),
    ],
)
def test_build_with_a_wrong_environment_says_what_to_do(environment: dict[str, str], expected: str) -> None:
    done = run("setup.py", "build_ext", **environment)
    assert done.returncode != 0 and expected in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["80+PTX", "90a"]),
        ({"TORCH_CSB_CUDA_ARCHS": "80;90a"}, ["80", "90a"]),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}, ["80", "90a+PTX"]),
        ({"TORCH_CSB_CUDA_ARCHS": "86", "TORCH_CUDA_ARCH_LIST": "8.0"}, ["86"]),
    ],
)
def test_architectures(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: list[str]) -> None:
    for name in ("TORCH_CSB_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tool("cuda_toolkit").selected_archs() == expected


@pytest.mark.parametrize("wrong", ["7.5", "hopper"])
def test_wrong_architectures_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    toolkit = tool("cuda_toolkit")
    monkeypatch.setenv("TORCH_CSB_CUDA_ARCHS", wrong)
    with pytest.raises(toolkit.ToolkitError, match=wrong.replace(".", "")):
        toolkit.selected_archs()


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_90a'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z3badv' for '{arch}'
ptxas info    : Function properties for _Z3badv
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
""".splitlines()


@pytest.mark.parametrize(("arch", "status"), [("sm_90a", 1), ("sm_80", 0)])
def test_a_spill_on_hopper_is_found(arch: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    compile_cuda = tool("compile_cuda")
    kernels = compile_cuda.parse_ptxas([line.format(arch=arch) for line in PTXAS])
    assert [(kernel.spilled, kernel.registers) for kernel in kernels] == [(0, 40), (32, 255)]
    assert compile_cuda.check_spills(kernels) == status
    assert ("register spill on sm_90a: 32 bytes" in capsys.readouterr().out) == bool(status)


def record_tree(root: Path) -> Path:
    for name in ("csrc/csb/csb.h", "csrc/cuda/spmm.h", "csrc/cpu/spmm.h", "torch_csb/matrix.py", "torch_csb/io.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "tests").mkdir()
    counts = {"passed": 1, "failed": 0, "skipped": 0, "sanitizer_errors": 0}
    record = {"gpu": "a", "driver": "b", "torch": "c", **counts, "files": tool("gpu_record").hashes(root)}
    (root / "tests" / "gpu_record.json").write_text(json.dumps(record))
    return root


def check_record(root: Path) -> subprocess.CompletedProcess[str]:
    # -S hides site-packages: the check must run where nothing is installed.
    return run("-S", ROOT / "tools" / "gpu_record.py", "--check", "--root", root)


def test_gpu_record_accepts_unchanged_sources(tmp_path: Path) -> None:
    root = record_tree(tmp_path)
    (root / "csrc/cpu/spmm.h").write_text("what no GPU runs")
    (root / "torch_csb/io.py").write_text("neither this")
    done = check_record(root)
    assert done.returncode == 0, done.stdout + done.stderr


def test_gpu_record_names_what_differs(tmp_path: Path) -> None:
    root = record_tree(tmp_path)
    (root / "csrc/csb/csb.h").write_text("changed")
    (root / "csrc/plan").mkdir()
    (root / "csrc/plan/units.h").write_text("added")
    (root / "torch_csb/matrix.py").unlink()
    done = check_record(root)
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-1]
    assert last == "since that run: changed csrc/csb/csb.h; added csrc/plan/units.h; removed torch_csb/matrix.py"


def test_gpu_record_names_what_did_not_end(tmp_path: Path) -> None:
    path = record_tree(tmp_path) / "tests" / "gpu_record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unfinished": ["racecheck edges"]}))
    assert "0 sanitizer errors, racecheck edges did not end" in check_record(tmp_path).stdout


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_gpu_record_ends_what_takes_too_long(tmp_path: Path, seconds: float) -> None:
    """Also what the sanitizer's own child holds open."""
    program = tmp_path / "sanitizer"
    program.write_text("#!/bin/sh\nsleep 60 &\nsleep 60\n")
    program.chmod(0o755)
    module = tool("gpu_record")
    module.last_gpu = lambda: "0"
    begin = time.monotonic()
    assert module.run_sanitizer(str(program), "memcheck", "edges", begin + seconds) is None
    assert time.monotonic() - begin < 30


def test_gpu_record_says_when_there_is_none(tmp_path: Path) -> None:
    done = check_record(tmp_path)
    assert done.returncode == 1 and "tests/gpu_record.json is missing" in done.stdout


@pytest.mark.slow
def test_sdist_builds_in_an_empty_folder(tmp_path: Path) -> None:
    done = run("setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "empty", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tree = next((tmp_path / "empty").iterdir())
    done = run("setup.py", "-q", "build_ext", "--inplace", cwd=tree, python_path=(), TORCH_CSB_CUDA="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    done = run("-m", "torch_csb", "info", cwd=tree, python_path=(tree,))
    assert done.returncode == 0, done.stderr
    used = run("-c", "import torch_csb; print(torch_csb.__file__)", cwd=tree, python_path=(tree,)).stdout
    assert used.startswith(str(tree))
