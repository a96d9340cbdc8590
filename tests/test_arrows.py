"""The arrows between folders: who may include or import whom. Data flows one way, and so do the dependencies."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', re.MULTILINE)

CPP_ARROWS = {
    "csb": {"csb"},
    "plan": {"plan", "csb"},
    "cpu": {"cpu", "plan", "csb"},
    "cuda": {"cuda", "plan", "csb"},
    "baseline": {"baseline", "plan", "csb", "cuda/device"},
    "torch": {"torch", "cpu", "cuda", "baseline", "plan", "csb"},
    "python": {"python", "plan", "csb"},
}
# Libraries that only some folders may see, by the start of the header's name.
LIBRARIES = {
    r"(torch|ATen|c10)/": {"torch"},
    r"(cuda|cub/|cooperative_groups)": {"cuda", "baseline", "torch"},
    r"(pybind11/|Python\.h)": {"python"},
}

# What a part of the package may not import. A part is a folder or a module directly in torch_csb; "core" is every
# module that is not named here. Lazy imports inside functions count.
ABOVE_CORE = {"nn", "prune", "io", "optim", "explain", "distributed", "baselines", "bench", "testing", "cli"}
PYTHON_BANS = {
    "core": ABOVE_CORE,
    "nn": {"prune", "io", "optim", "explain", "distributed", "baselines", "bench", "testing", "cli"},
    "prune": {"io", "optim", "explain", "convert", "autograd", "distributed", "baselines", "bench", "testing", "cli"},
    "io": {"prune", "distributed", "baselines", "bench", "testing", "cli"},
    "optim": {"prune", "distributed", "baselines", "bench", "testing", "cli"},
    "explain": {"prune", "distributed", "baselines", "bench", "testing", "cli"},
    "distributed": {"prune", "io", "optim", "explain", "baselines", "bench", "testing", "cli"},
    "baselines": ABOVE_CORE - {"baselines"},
    "__init__": {"prune", "distributed", "baselines", "bench", "testing", "cli"},
    "__main__": {"prune", "baselines"},
    "cli": {"prune", "baselines", "bench", "testing"},
    "bench": {"cli"},
    "testing": set(),
}
OUTSIDE = {"tests", "benchmarks", "examples", "tools", "cases", "conftest"}


def allowed(header: str, folders: set[str]) -> bool:
    return any(header.startswith(folder + "/") for folder in folders)


def cuda_violation(path: str, header: str) -> str | None:
    """A kernel is included by its launcher alone, a launcher by its instantiations, and an operation by no other."""
    here, there = Path(path), Path(header)
    operation = there.parts[1]
    if operation == "device":
        return None
    if here.parts[:2] != ("cuda", operation):
        crosses = here.parts[0] == "cuda" or there.suffix != ".h"
        return "an operation's folder shows only its header, and only to the border" if crosses else None
    if there.stem.endswith("_launch") and here.parts[2] != "instantiations":
        return "a launcher is included only by its instantiations"
    launcher = there.with_name(there.stem + "_launch.cuh")
    if there.suffix == ".cuh" and (CSRC / launcher).is_file() and here != launcher:
        return "a kernel is included only by its launcher"
    return None


def cpp_violation(path: str, quote: str, header: str) -> str | None:
    """Why csrc/`path` may not include `header`, None when it may."""
    folder = path.split("/")[0]
    own = header.split("/")[0] in CPP_ARROWS and quote == '"'
    if own:
        if not allowed(header, CPP_ARROWS[folder]):
            return f"{folder} may include only {', '.join(sorted(CPP_ARROWS[folder]))}"
        return cuda_violation(path, header) if header.startswith("cuda/") else None
    if quote == '"':
        return "headers of this project are included by their path from csrc"
    for pattern, folders in LIBRARIES.items():
        if re.match(pattern, header) and folder not in folders:
            return f"only {', '.join(sorted(folders))} may include {header.split('/')[0]}"
    return None


def cpp_violations() -> Iterator[str]:
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            name = path.relative_to(CSRC).as_posix()
            for quote, header in INCLUDE.findall(path.read_text(encoding="utf-8")):
                reason = cpp_violation(name, quote, header)
                if reason:
                    yield f"csrc/{name} includes {header}: {reason}"


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute names of all that a module imports; of `from a import b` both a and a.b, for b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(path: str) -> str:
    part = path.split("/")[1].removesuffix(".py")
    return part if part in PYTHON_BANS else "core"


def python_violation(path: str, module: str) -> str | None:
    """Why torch_csb/… `path` may not import `module`, None when it may."""
    top, *rest = module.split(".")
    if top in OUTSIDE:
        return "the package imports nothing from outside it"
    if top == "torch_csb" and rest and rest[0] in PYTHON_BANS[part_of(path)]:
        return f"{part_of(path)} may not import {', '.join(sorted(PYTHON_BANS[part_of(path)]))}"
    return None


def python_violations() -> Iterator[str]:
    for path in sorted((ROOT / "torch_csb").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for module in imported_modules(path.read_text(encoding="utf-8"), package):
            reason = python_violation(name, module)
            if reason:
                yield f"{name} imports {module}: {reason}"


def test_cpp_arrows() -> None:
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} <= set(CPP_ARROWS), "a folder without arrows"
    found = list(cpp_violations())
    assert not found, "\n".join(found)


def test_python_arrows() -> None:
    found = list(python_violations())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "quote", "header"),
    [
        ("csb/csb.h", '"', "plan/units.h"),
        ("csb/csb.h", "<", "cuda_runtime.h"),
        ("plan/units.h", "<", "torch/csrc/stable/library.h"),
        ("cpu/spmm.cpp", '"', "cuda/spmm/spmm.h"),
        ("cpu/spmm.cpp", '"', "spmm.h"),
        ("cuda/spmm/spmm.cpp", '"', "torch/operands.h"),
        ("cuda/spmm/spmm.cpp", '"', "cuda/sddmm/sddmm.h"),
        ("cuda/spmm/spmm.cpp", '"', "cuda/spmm/gather_launch.cuh"),
        ("baseline/csr.cu", '"', "cuda/spmm/spmm.h"),
        ("torch/cuda.cpp", '"', "cuda/spmm/tile.cuh"),
        ("torch/cuda.cpp", "<", "pybind11/pybind11.h"),
        ("python/plan_module.cpp", '"', "cpu/spmm.h"),
        ("python/plan_module.cpp", "<", "ATen/ATen.h"),
    ],
)
def test_a_wrong_include_is_found(path: str, quote: str, header: str) -> None:
    assert cpp_violation(path, quote, header)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("torch_csb/ops.py", "from torch_csb.nn import CSBLinear"),
        ("torch_csb/ops.py", "from torch_csb import nn"),
        ("torch_csb/ops.py", "def f():\n    from .bench import cases"),
        ("torch_csb/nn/linear.py", "import torch_csb.prune.magnitude"),
        ("torch_csb/nn/linear.py", "from ..testing import compare"),
        ("torch_csb/prune/magnitude.py", "from torch_csb import convert"),
        ("torch_csb/__init__.py", "from torch_csb import bench"),
        ("torch_csb/__init__.py", "from torch_csb.distributed import prepare_"),
        ("torch_csb/distributed/_linear.py", "from torch_csb import io"),
        ("torch_csb/ops.py", "from torch_csb import baselines"),
        ("torch_csb/cli/inspect.py", "from torch_csb.bench import pictures"),
        ("torch_csb/io.py", "import torch_csb.cli"),
        ("torch_csb/__main__.py", "import torch_csb.baselines"),
        ("torch_csb/baselines.py", "from torch_csb.testing import compare"),
        ("torch_csb/matrix.py", "import tests.cases"),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    package = ".".join(path.split("/")[:-1])
    assert any(python_violation(path, module) for module in imported_modules(source, package))
