"""Builds the operators with the compiler's address and undefined-behaviour sanitizers and runs what reaches borders.

    .venv/bin/python tools/sanitize.py [--quick] [pytest's own arguments]

The instrumented library lies in build/asan beside a copy of the package, so the usual build stays as it is. CPU only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "asan"
PACKAGE = WORK / "lib"
QUICK = ("test_bounds.py", "test_damaged.py", "test_state.py", "test_io.py")
MORE = (
    "test_format.py",
    "test_convert.py",
    "test_ops.py",
    "test_few_columns.py",
    "test_capability.py",
    "test_linear.py",
    "test_conv.py",
    "test_baselines.py",
    "test_prune_forged.py",
    "test_property.py",
)
# An unvalidated matrix whose first block claims entries that values doesn't have: what must be reported.
CANARY = """
import torch, torch_csb
w = torch_csb.CSBMatrix.from_dense(torch.ones(16, 16), block_size=16)
w.blk_ptr[1] += 800
print("loaded", torch_csb.__file__, flush=True)
w.to_dense()
"""


def build() -> None:
    PACKAGE.mkdir(parents=True, exist_ok=True)
    command = ["setup.py", "-q", "build", "--build-base", str(WORK), "--build-lib", str(PACKAGE)]
    environment = os.environ | {"TORCH_CSB_CUDA": "0", "TORCH_CSB_SANITIZE": "address,undefined"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def runtime() -> str:
    """The libraries to load first. The C++ one is among them because the sanitizer looks for its throw at start."""
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    for name, path in zip(names, paths, strict=True):
        if not os.path.isabs(path):
            raise SystemExit(f"{compiler} has no {name}: install its sanitizers (Debian: libasan, libubsan)")
    return " ".join(paths)


def environment(report: Path) -> dict[str, str]:
    return os.environ | {
        "LD_PRELOAD": runtime(),
        # Python and torch keep memory until the process ends, so leaks say nothing.
        "ASAN_OPTIONS": f"detect_leaks=0:abort_on_error=1:log_path={report}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={report}",
        "PYTHONPATH": str(PACKAGE),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def main(arguments: list[str]) -> int:
    quick = "--quick" in arguments
    build()
    report = WORK / "report"
    for old in WORK.glob("report.*"):
        old.unlink()
    # The working folder stands first on the module path: the instrumented package, not the one in the root.
    options = {"cwd": PACKAGE, "env": environment(report)}
    canary = subprocess.run([sys.executable, "-c", CANARY], **options, capture_output=True, text=True)
    found = [path.read_text() for path in WORK.glob("report.*")]
    if f"loaded {PACKAGE}" not in canary.stdout or not any("heap-buffer-overflow" in text for text in found):
        print(canary.stdout, canary.stderr, *found, "the sanitizer missed an access that is wrong", sep="\n")
        return 1
    for old in WORK.glob("report.*"):
        old.unlink()
    files = [str(ROOT / "tests" / name) for name in (QUICK if quick else QUICK + MORE)]
    rest = [argument for argument in arguments if argument != "--quick"]
    begin = time.monotonic()
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *rest]
    status = subprocess.run([sys.executable, *command], **options).returncode
    found = [path.read_text() for path in sorted(WORK.glob("report.*"))]
    print(*found, sep="\n")
    print(f"{len(found)} reports of the sanitizers, pytest ended with {status}, {time.monotonic() - begin:.0f} s")
    return 1 if found else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
