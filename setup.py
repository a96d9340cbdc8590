"""Builds torch_csb._C (operators, stable ABI, one library for torch 2.11 and newer) and torch_csb._plan (pybind11).

Environment: TORCH_CSB_CUDA=auto|0|1, TORCH_CSB_CUDA_ARCHS (see tools/cuda_toolkit.py), CUDA_HOME, MAX_JOBS;
TORCH_CSB_SANITIZE=address,undefined builds the operators with these of the compiler's sanitizers (see `make asan`).
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402

MIN_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"
# What is linked statically stays private: the CUDA runtime, beside torch's own, and libstdc++, which a compiler without
# its shared library puts in whole and whose symbols, half of them bound to the other copy in the process, crashed.
LINK_FLAGS = ["-Wl,-s", "-Wl,--exclude-libs,ALL"]

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def torch_problem() -> str | None:
    """Why this Python's torch can't be built against, as a sentence that says what to do; None when it can."""
    if torch is None:
        return (
            "torch_csb compiles against the torch that it will run with, and this Python has none: install torch 2.11 "
            "or newer, then run `pip install --no-build-isolation .` in the same environment."
        )
    if torch.version.hip is not None:
        return (
            f"torch_csb runs on CPUs and NVIDIA GPUs, and this torch is a ROCm build (hip {torch.version.hip}): "
            "install a CPU or CUDA build of torch."
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return f"torch_csb needs torch 2.11 or newer, got {torch.__version__}: upgrade torch."
    return None


def wanted_cuda_home() -> Path | None:
    """The toolkit to compile the CUDA sources with, or None. A GPU is never asked for: build machines have none."""
    wish = os.environ.get("TORCH_CSB_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"expected TORCH_CSB_CUDA to be auto, 0 or 1, got {wish!r}")
    if wish == "0" or (wish == "auto" and torch.version.cuda is None):
        return None
    home = cuda_toolkit.find_cuda_home()
    if home is None and wish == "1":
        raise SystemExit(
            "TORCH_CSB_CUDA=1 needs a CUDA toolkit (bin/nvcc, headers and libcudart_static.a), and none was found: "
            "install one or point CUDA_HOME at it, or set TORCH_CSB_CUDA=0."
        )
    if home is None:
        print("torch_csb: torch has CUDA but no nvcc was found, so only the CPU operators are built; set CUDA_HOME.")
    return home


def sanitizer_flags() -> list[str]:
    """What TORCH_CSB_SANITIZE asks of compiler and linker. An error ends the process, or nobody would see it."""
    wish = os.environ.get("TORCH_CSB_SANITIZE", "")
    names = [name for name in wish.split(",") if name]
    if not set(names) <= {"address", "undefined"}:
        raise SystemExit(f"expected TORCH_CSB_SANITIZE to be address, undefined or both with a comma, got {wish!r}")
    return [f"-fsanitize={','.join(names)}", "-fno-sanitize-recover=all"] if names else []


def operators() -> Extension:
    cxx = ["-O3", "-g0", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    nvcc = []
    # A kernel that is declared and nowhere defined fails here, not when a user loads the library.
    link = [*LINK_FLAGS, "-Wl,-z,defs"]
    if sanitizers := sanitizer_flags():
        # A report without names and lines would be of little use, so nothing is stripped.
        cxx += [*sanitizers, "-O1", "-g1", "-fno-omit-frame-pointer"]
        link = ["-Wl,--exclude-libs,ALL", *sanitizers]
    includes = [str(ROOT / "csrc")]
    files = sources("plan/**/*.cpp", "cpu/**/*.cpp", "baseline/cpu/**/*.cpp", "torch/**/*.cpp")

    home = wanted_cuda_home()
    # libtorch alone depends on libtorch_cuda, where the weak CUDA shims are found at load time; nothing else refers to
    # it, so the linker must be told to keep it, before it reads the name.
    link += ["-Wl,--no-as-needed", "-ltorch"]
    if home is not None:
        # cpp_extension leaves CUDA_HOME empty under a CPU torch, where CUDAExtension would refuse to build at all.
        cpp_extension.CUDA_HOME = str(home)
        archs = cuda_toolkit.selected_archs()
        names, version = cuda_toolkit.arch_names(archs), cuda_toolkit.nvcc_version(home)
        print(f"torch_csb: compiling CUDA sources with {home} (CUDA {version}) for {names}")
        files += sources("cuda/**/*.cu", "cuda/**/*.cpp", "baseline/**/*.cu")
        includes.append(str(cuda_toolkit.include_dir(home)))
        cxx += ["-DTORCH_CSB_WITH_CUDA", "-DUSE_CUDA", f'-DTORCH_CSB_CUDA_VERSION="{version}"']
        cxx.append(f'-DTORCH_CSB_CUDA_ARCHS="{names}"')
        # torch's defaults forbid the operators of the 16-bit types; the kernels see no torch header and may use them.
        bans = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
        nvcc = ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", *(f"-U__CUDA_NO_{ban}__" for ban in bans)]
        nvcc += cuda_toolkit.gencode_flags(archs)
        link += [f"-L{cuda_toolkit.library_dir(home)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]

    return cpp_extension.CppExtension(
        "torch_csb._C",
        files,
        include_dirs=includes,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        py_limited_api=True,
    )


def planner() -> list[Extension]:
    """torch's own copy of pybind11 doesn't compile under the target macro, so pip's is asked for and may be missing."""
    try:
        import pybind11
    except ImportError:
        print("torch_csb: without pybind11 torch_csb._plan (explain and plots) is not built; pip install pybind11.")
        return []
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        print("torch_csb: without Python.h torch_csb._plan (explain and plots) is not built; apt install python3-dev.")
        return []
    return [
        Extension(
            "torch_csb._plan",
            sources("plan/**/*.cpp", "python/**/*.cpp"),
            include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
            extra_compile_args=["-O2", "-g0", "-std=c++17", "-fvisibility=hidden"],
            extra_link_args=LINK_FLAGS,
            language="c++",
        )
    ]


class NoBuild(build_ext):
    """Stands in where torch can't be built against, so that sdist and metadata work and a build says why it doesn't."""

    def run(self) -> None:
        raise SystemExit(torch_problem())


def put_ninja_on_path() -> None:
    """torch looks for the program on PATH, where an environment that was not activated doesn't put pip's."""
    try:
        import ninja
    except ImportError:
        return
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])


def drop_stale_cuda_objects(folder: str) -> None:
    """Under a CPU torch cpp_extension tells ninja nothing of the headers that a .cu file includes."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*h"))
    for part in ("csrc/cuda", "csrc/baseline"):
        for compiled in Path(folder, part).rglob("*.o"):
            if compiled.stat().st_mtime < newest:
                compiled.unlink()


def build_options() -> dict[str, object]:
    if torch_problem() is not None:
        return {"ext_modules": [Extension("torch_csb._C", [])], "cmdclass": {"build_ext": NoBuild}}

    class Build(cpp_extension.BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            # One ninja file per extension: they share csrc/plan but not its flags, and would undo each other's objects.
            shared = self.build_temp
            self.build_temp = os.path.join(shared, ext.name.rpartition(".")[2])
            if torch.version.cuda is None:
                drop_stale_cuda_objects(self.build_temp)
            try:
                super().build_extension(ext)
            except RuntimeError as error:
                raise SystemExit(f"torch_csb: {error}; the compiler's message stands above") from None
            finally:
                self.build_temp = shared

    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    put_ninja_on_path()
    try:
        extensions = [operators(), *planner()]
    except cuda_toolkit.ToolkitError as error:
        raise SystemExit(str(error)) from error
    # _C needs Python 3.10's limited API at most (it has no Python code at all); _plan is left out where Python differs.
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


os.chdir(ROOT)
setup(**build_options())
