"""Makes the virtual environment that `make` works in: `python3 tools/bootstrap.py .venv`. Standard library only.

A torch that the calling Python can import is used through the new environment, not installed again. Only what is
missing is installed, so a machine that has everything is never asked to reach a package registry.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)
TORCH_PIN = "torch==2.13.0"
# Where there is no GPU the registry's own wheel would bring gigabytes of CUDA libraries along.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Besides torch: import name -> what to ask pip for.
REQUIRED = {
    "setuptools": "setuptools",
    "wheel": "wheel",
    "ninja": "ninja",
    "numpy": "numpy",
    "pytest": "pytest",
    "safetensors": "safetensors",
}
OPTIONAL = {
    "pybind11": ("pybind11", "torch_csb._plan is not built, and explain() and its tests are skipped"),
    "scipy": ("scipy", "conversion from and to SciPy is not tested"),
    "transformers": ("transformers", "Hugging Face models are not tested"),
    "hypothesis": ("hypothesis", "the property tests are skipped"),
    "sklearn": ("scikit-learn", "the demo has no data set"),
    "matplotlib": ("matplotlib", "the demo draws no picture"),
    "tqdm": ("tqdm", "the demo shows no progress bars"),
}
LINT = {"ruff": "ruff==0.17.5", "clang_format": "clang-format==23.1.5"}


def torch_of_this_python() -> str | None:
    """Version of the torch that the calling Python imports, None when it has none or an older one than 2.11."""
    if importlib.util.find_spec("torch") is None:
        return None
    code = "import torch; print(torch.__version__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    version = found.stdout.strip()
    match = re.match(r"(\d+)\.(\d+)", version)
    if found.returncode != 0 or not match or tuple(map(int, match.groups())) < MIN_TORCH:
        print(f"torch of {sys.executable} is not used: {version or 'it fails to import'} (2.11 or newer is needed)")
        return None
    return version


def check_machine() -> None:
    if sys.version_info < MIN_PYTHON:
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.x …")
    if shutil.which("g++") is None and shutil.which(os.environ.get("CXX", "c++")) is None:
        raise SystemExit("a C++ compiler is needed: apt install g++")


def create(folder: Path, inherit: bool) -> Path:
    """An environment without pip, which needs no ensurepip; pip follows only when there is something to install."""
    venv.EnvBuilder(system_site_packages=inherit, clear=True, with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    # Scripts outside the package's folder (examples, tools) import the package that is built in place.
    (packages / "_this_checkout.pth").write_text(f"{ROOT}\n")
    if inherit and sys.prefix != sys.base_prefix:
        # --system-site-packages shows the base Python's packages, never those of a virtual environment around it.
        lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
        (packages / "_outer_environment.pth").write_text("".join(lines))
    return python


def missing(python: Path, names: list[str]) -> list[str]:
    # Running `ninja` is all that is asked of it, so the program alone does as well as the package.
    probe = (
        "import importlib.util, shutil, sys\n"
        "absent = [n for n in sys.argv[1:] if importlib.util.find_spec(n) is None]\n"
        "print(*[n for n in absent if n != 'ninja' or shutil.which('ninja') is None])"
    )
    return subprocess.run([python, "-c", probe, *names], capture_output=True, text=True, check=True).stdout.split()


def pip_command(python: Path) -> list[str]:
    """pip inside the environment: its own, one that it inherits, or a fresh one from ensurepip."""
    pip = [str(python), "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode == 0:
        return pip
    fresh = subprocess.run([python, "-m", "ensurepip", "--upgrade", "--default-pip"], capture_output=True, text=True)
    if fresh.returncode != 0:
        raise SystemExit(
            "something must be installed and this Python can't put pip into a virtual environment (ensurepip is "
            "missing or broken): apt install python3-venv"
        )
    return pip


def install(python: Path, wanted: list[str], *options: str) -> bool:
    command = [*pip_command(python), "install", "-qq", "--disable-pip-version-check", "--retries", "1"]
    print("installing", *wanted, flush=True)
    return subprocess.run([*command, *options, *wanted]).returncode == 0


def install_torch(python: Path) -> None:
    if shutil.which("nvidia-smi") is None and install(
        python, [TORCH_PIN], "--retries", "0", "--index-url", TORCH_CPU_INDEX
    ):
        return
    if not install(python, [TORCH_PIN]):
        raise SystemExit(f"pip could not install {TORCH_PIN} (see above): install torch 2.11 or newer yourself")


def fill(python: Path) -> None:
    if missing(python, ["torch"]):
        install_torch(python)
    required = [REQUIRED[name] for name in missing(python, list(REQUIRED))]
    if required and not install(python, required):
        raise SystemExit(f"pip could not install what is needed (see above): {' '.join(required)}")
    optional = missing(python, list(OPTIONAL))
    # All at once is quicker; one by one only when that fails, so that one missing package costs no other.
    if not optional or install(python, [OPTIONAL[name][0] for name in optional]):
        return
    for name in optional:
        package, consequence = OPTIONAL[name]
        if len(optional) == 1 or not install(python, [package]):
            print(f"going on without {package}: {consequence}")


def main(arguments: list[str]) -> None:
    if arguments[0] == "--lint":
        python = Path(arguments[1], "bin", "python")
        absent = [LINT[name] for name in missing(python, list(LINT))]
        if absent and not install(python, absent):
            raise SystemExit(f"pip could not install the lint tools (see above): {' '.join(absent)}")
        return
    check_machine()
    version = torch_of_this_python()
    folder = Path(arguments[0]).absolute()
    torch = f"torch {version} of {sys.executable}" if version else "its own torch"
    print(f"making {folder.name} with {torch}", flush=True)
    fill(create(folder, inherit=version is not None))


if __name__ == "__main__":
    main(sys.argv[1:])
