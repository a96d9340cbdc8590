"""What this installation can do: versions, architectures, what was built, what is missing and what to do about it."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass, field

import torch

from torch_csb._load import library_path
from torch_csb._version import __version__


@dataclass(frozen=True)
class BuildInfo:
    """What `build_info()` found.

    Attributes:
        version, torch, python: versions in use. `torch_cuda` is the CUDA version of torch, None for a CPU build.
        library: file name of the operator library.
        cuda: CUDA version that the kernels were compiled with, None when they were not built.
        archs: what they were compiled for, e.g. ("sm_80", "sm_90a").
        cpu: the CPU code path in use: "default", "avx2" or "avx512".
        gpus: name and compute capability of every GPU that torch sees.
        planner: whether torch_csb._plan (for explain and plots) was built for this Python.
        missing: one sentence for each thing that isn't there, with what to do.
    """

    version: str
    torch: str
    torch_cuda: str | None
    python: str
    library: str
    cuda: str | None
    archs: tuple[str, ...]
    cpu: str
    gpus: tuple[str, ...]
    planner: bool
    missing: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        rows = [
            ("torch_csb", self.version),
            ("torch", f"{self.torch} ({'CUDA ' + self.torch_cuda if self.torch_cuda else 'CPU build'})"),
            ("python", self.python),
            ("operators", f"{self.library}, CPU code path {self.cpu}"),
            ("CUDA kernels", f"CUDA {self.cuda} for {', '.join(self.archs)}" if self.cuda else "not built"),
            ("GPUs", ", ".join(self.gpus) or "none found"),
            ("planner", "built" if self.planner else "not built"),
            ("missing", "nothing" if not self.missing else ""),
        ]
        lines = [f"{name:<13} {value}".rstrip() for name, value in rows]
        return "\n".join(lines + [f"  - {sentence}" for sentence in self.missing])


def _parse(text: str) -> dict[str, str]:
    """ "cuda=13.0;archs=sm_80,sm_90a;cpu=avx2" as the operator reports it."""
    pairs = (part.partition("=") for part in text.split(";") if part)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _missing(cuda: str | None, gpus: list[tuple[str, tuple[int, int]]], planner: bool) -> list[str]:
    sentences = []
    if cuda is None and torch.version.cuda is not None:
        sentences.append(
            "torch has CUDA but the CUDA kernels were not built: install the CUDA toolkit (or point CUDA_HOME at it) "
            "and build again; TORCH_CSB_CUDA=1 makes the build fail instead of leaving them out."
        )
    if cuda is not None and torch.version.cuda is None:
        sentences.append("The CUDA kernels were built but torch is a CPU build: install a CUDA build of torch.")
    for name, capability in gpus:
        if capability < (8, 0):
            sentences.append(f"{name} is sm_{capability[0]}{capability[1]}; the CUDA kernels need sm_80 or newer.")
    if cuda is not None and torch.version.cuda is not None and not gpus:
        sentences.append("torch sees no GPU: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES.")
    if torch.version.hip is not None:
        sentences.append("torch_csb doesn't support this ROCm build of torch: install a CPU or CUDA build.")
    if not planner:
        sentences.append(
            "torch_csb._plan, which explain and plots need, is not built for this Python: it takes pybind11 (pip) and "
            "Python.h (python3-dev); install what is missing and build again."
        )
    return sentences


def build_info() -> BuildInfo:
    """Versions, architectures and gaps of this installation; `print` it, or run `python -m torch_csb info`."""
    library = library_path()
    compiled = _parse(torch.ops.torch_csb.build_info())
    cuda = compiled.get("cuda")
    if cuda in (None, "", "none", "0"):
        cuda = None
    devices = range(torch.cuda.device_count())
    gpus = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in devices]
    planner = importlib.util.find_spec("torch_csb._plan") is not None
    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        python=platform.python_version(),
        library=library.name if library else "",
        cuda=cuda,
        archs=tuple(arch for arch in compiled.get("archs", "").split(",") if cuda and arch),
        cpu=compiled.get("cpu", "unknown"),
        gpus=tuple(f"{name} (sm_{major}{minor})" for name, (major, minor) in gpus),
        planner=planner,
        missing=tuple(_missing(cuda, gpus, planner)),
    )
