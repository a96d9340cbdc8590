"""Compiles the whole library with its CUDA sources, on any machine with nvcc, and reads what ptxas says.

Prints the ten slowest compiles, fails when an sm_90a kernel spills registers, and loads the result beside whatever
torch is there, which shows that the library also loads where no CUDA is. `python tools/compile_cuda.py`
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda-check"
SPILL_FREE_ARCH = "sm_90a"

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass
class Kernel:
    name: str
    arch: str
    spilled: int = 0
    registers: int = 0


def parse_ptxas(lines: list[str]) -> list[Kernel]:
    """Kernels in the order in which ptxas reports them. What it says of a device function that was not inlined counts
    for the entry it follows: a spill there is a spill of the kernel."""
    kernels: list[Kernel] = []
    for line in lines:
        if match := ENTRY.search(line):
            kernels.append(Kernel(*match.groups()))
        elif (match := SPILL.search(line)) and kernels:
            kernels[-1].spilled += int(match.group(2)) + int(match.group(3))
        elif (match := REGISTERS.search(line)) and kernels:
            kernels[-1].registers = int(match.group(1))
    return kernels


def build(home: Path) -> list[str]:
    """Output of the build. It starts from nothing, for ninja would print nothing of a file that is up to date."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    environment = {**os.environ, "TORCH_CSB_CUDA": "1", "CUDA_HOME": str(home), "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(FOLDER / "objects")]
    command += ["--build-lib", str(FOLDER / "library")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        # A failed compile must be readable; the commands and ptxas's thousand lines need not be.
        if not re.match(r"ptxas info|\s+\d+ bytes stack frame|\[\d+/\d+\] |\S*\+\+ .* -shared |\s*$", line):
            print(line, end="", flush=True)
    if process.wait() != 0:
        raise SystemExit("compile_cuda: the build failed, see above")
    return lines


def print_slowest() -> None:
    times = {}
    for log in FOLDER.glob("objects/*/.ninja_log"):
        for line in log.read_text().splitlines()[1:]:
            start, end, _, target, _ = line.split("\t")
            times[target] = (int(end) - int(start)) / 1000
    print("slowest 10 compiles:")
    for target, seconds in sorted(times.items(), key=lambda item: -item[1])[:10]:
        print(f"{seconds:8.1f} s  {Path(target).relative_to(FOLDER / 'objects')}")


def demangle(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    return subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name


def check_spills(kernels: list[Kernel]) -> int:
    archs = sorted({kernel.arch for kernel in kernels})
    for arch in archs:
        mine = [kernel for kernel in kernels if kernel.arch == arch]
        most = max(mine, key=lambda kernel: kernel.registers)
        spilling = sum(kernel.spilled > 0 for kernel in mine)
        print(f"{arch}: {len(mine)} kernels, {spilling} spill, at most {most.registers} registers")
    if SPILL_FREE_ARCH not in archs:
        raise SystemExit(f"compile_cuda: no kernel was compiled for {SPILL_FREE_ARCH}")
    spills = [kernel for kernel in kernels if kernel.arch == SPILL_FREE_ARCH and kernel.spilled]
    for kernel in spills:
        print(f"register spill on {kernel.arch}: {kernel.spilled} bytes in {demangle(kernel.name)}")
    return 1 if spills else 0


def load_result() -> None:
    library = next((FOLDER / "library").glob("torch_csb/_C*.so"))
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.torch_csb.build_info())"
    loaded = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True)
    if loaded.returncode != 0:
        print(loaded.stderr)
        raise SystemExit("compile_cuda: the library with CUDA kernels does not load")
    print(f"{library.name} ({library.stat().st_size / 1e6:.1f} MB) loads: {loaded.stdout.strip()}")


def main() -> int:
    home = cuda_toolkit.find_cuda_home()
    if home is None:
        raise SystemExit("compile_cuda: no CUDA toolkit found; set CUDA_HOME")
    kernels = parse_ptxas(build(home))
    print_slowest()
    result = check_spills(kernels)
    load_result()
    return result


if __name__ == "__main__":
    sys.exit(main())
