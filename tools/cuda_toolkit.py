"""Where nvcc is and which architectures to compile for, for setup.py and compile_cuda.py. Standard library only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

# sm_80 machine code also runs on 8.6 and 8.9; its PTX serves chips newer than Hopper. 90a is not forward compatible.
DEFAULT_ARCHS = ("80+PTX", "90a")


class ToolkitError(Exception):
    """The message is one sentence for the user that says what to do."""


def _candidates() -> Iterator[Path]:
    """What the user named, and that alone; else the usual places."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        yield Path(named)
        return
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parent.parent
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)


def include_dir(home: Path) -> Path | None:
    for folder in (home / "include", *sorted(home.glob("targets/*-linux/include"))):
        if (folder / "cuda_runtime_api.h").is_file():
            return folder
    return None


def library_dir(home: Path) -> Path | None:
    for folder in (home / "lib64", home / "lib", *sorted(home.glob("targets/*-linux/lib"))):
        if (folder / "libcudart_static.a").is_file():
            return folder
    return None


def find_cuda_home() -> Path | None:
    """The first toolkit with nvcc, headers and the static runtime. nvcc on PATH may be a wrapper that stands elsewhere,
    so a folder counts only when all three are in it."""
    for home in _candidates():
        if (home / "bin" / "nvcc").is_file() and include_dir(home) and library_dir(home):
            return home
    return None


def nvcc_version(home: Path) -> str:
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def _native_archs() -> list[str]:
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        text = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolkitError(
            "TORCH_CSB_CUDA_ARCHS=native needs a GPU that nvidia-smi sees; name one, e.g. 90a"
        ) from error
    found = sorted({line.strip().replace(".", "") for line in text.splitlines() if line.strip()})
    return ["90a" if arch == "90" else arch for arch in found]


def selected_archs() -> list[str]:
    """From TORCH_CSB_CUDA_ARCHS ("80;90a", "native"), else TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), else the default.

    Plain 9.0 is read as 90a: the Hopper instructions that the kernels use exist only there.
    """
    text = os.environ.get("TORCH_CSB_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or ""
    if text.strip() == "native":
        return _native_archs()
    archs = [part.replace(".", "") for part in re.split(r"[;,\s]+", text) if part] or list(DEFAULT_ARCHS)
    for arch in archs:
        match = re.fullmatch(r"(\d{2,3})[af]?(\+PTX)?", arch)
        if not match:
            raise ToolkitError(f"expected architectures like 80;90a or 8.0;9.0a+PTX, got {text!r}")
        if int(match.group(1)) < 80:
            raise ToolkitError(f"torch_csb needs sm_80 or newer, got {arch!r} in {text!r}")
    return [re.sub(r"^90(?!a)", "90a", arch) for arch in archs]


def gencode_flags(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number, ptx, _ = arch.partition("+PTX")
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def arch_names(archs: list[str]) -> str:
    return ",".join("sm_" + arch.partition("+PTX")[0] for arch in archs)
