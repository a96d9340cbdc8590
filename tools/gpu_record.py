"""The record of the last run on a GPU: `python tools/gpu_record.py` writes it there, `--check` compares it anywhere.

The run needs a GPU, the built package and compute-sanitizer: the whole test suite, beside it memcheck and racecheck
over tests/sanitizer_cases.py. The record names the machine, counts what passed, names the sanitizer's parts that did
not end within --minutes, and keeps one hash for each file that decides what runs on a GPU. --check uses the standard
library alone, names the files that differ, and exits 1 when there are any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path("tests/gpu_record.json")
FOLDERS = ("csb", "plan", "cuda", "baseline", "torch")
MODULES = ("matrix.py", "ops.py", "autograd.py", "_fake.py")
CASES = "tests/sanitizer_cases.py"
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}


def hashes(root: Path) -> dict[str, str]:
    files = [path for folder in FOLDERS for path in (root / "csrc" / folder).rglob("*") if path.is_file()]
    files += [path for name in MODULES if (path := root / "torch_csb" / name).is_file()]
    digest = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    return dict(sorted(digest.items()))


def check(root: Path) -> int:
    path = root / RECORD
    if not path.is_file():
        print(f"{RECORD} is missing: run `python tools/gpu_record.py` on a GPU machine")
        return 1
    record = json.loads(path.read_text())
    recorded, current = record["files"], hashes(root)
    print(
        f"{record['gpu']}, driver {record['driver']}, torch {record['torch']}: {record['passed']} passed, "
        f"{record['failed']} failed, {record['skipped']} skipped, {record['sanitizer_errors']} sanitizer errors"
        + "".join(f", {part} did not end" for part in record.get("unfinished", ()))
    )
    differences = {
        "changed": [name for name in current if name in recorded and recorded[name] != current[name]],
        "added": [name for name in current if name not in recorded],
        "removed": [name for name in recorded if name not in current],
    }
    if any(differences.values()):
        parts = [f"{kind} {', '.join(names)}" for kind, names in differences.items() if names]
        print("since that run: " + "; ".join(parts))
        return 1
    print("the sources are those of that run")
    return 0


def machine() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed to make the record and torch sees none; --check works anywhere")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__}


def last_gpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")[-1]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[-1]


def run_tests() -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "tests", "--durations=10", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT)
        if not report.is_file():
            raise SystemExit("pytest wrote no report, so there is nothing to record")
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def find_sanitizer() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if found is None:
        raise SystemExit("compute-sanitizer (part of the CUDA toolkit) is needed: put it on PATH or set CUDA_HOME")
    return found


def sanitizer_parts() -> list[str]:
    done = subprocess.run([sys.executable, CASES, "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def run_sanitizer(program: str, tool: str, part: str, end: float) -> int | None:
    """Errors found, None where the time was up before the part had ended."""
    if time.monotonic() >= end:
        return None
    # torch's caching allocator would hand out neighbours of a buffer as valid memory and hide an overrun.
    # More CPU threads than free cores, which the tests beside it take, wait for each other for minutes.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    # Where there are several GPUs the tests keep the first ones busy.
    environment["CUDA_VISIBLE_DEVICES"] = last_gpu()
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [program, "--tool", tool, "--print-limit", "20", sys.executable, CASES, "--only", part]
    begin = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)  # the script too, which else would keep the pipe open

    clock = threading.Timer(min(end - time.monotonic(), threading.TIMEOUT_MAX), stop)
    clock.start()
    lines = []
    for line in process.stdout:
        print(f"[{tool} {part}] {line}", end="", flush=True)
        lines.append(line)
    code = process.wait()
    clock.cancel()
    if stopped.is_set():
        print(f"[{tool} {part}] did not end in time", flush=True)
        return None
    found = SUMMARY[tool].search("".join(lines))
    if code != 0 or found is None:
        raise SystemExit(f"compute-sanitizer --tool {tool} did not run {part} to its end; nothing is recorded")
    print(f"[{tool} {part}] {time.monotonic() - begin:.0f} s", flush=True)
    return int(found.group(1))


def record(output: Path, minutes: float) -> int:
    end = time.monotonic() + 60 * minutes
    entry: dict[str, object] = machine()
    program = find_sanitizer()
    files = hashes(ROOT)
    # The sanitizer is slow on one core and leaves the GPU nearly idle, so all run at once: the slower tool first.
    jobs = [(tool, part) for tool in reversed(SUMMARY) for part in sanitizer_parts()]
    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)) // 2)) as pool:
        sanitizers = [pool.submit(run_sanitizer, program, tool, part, end) for tool, part in jobs]
        tests = run_tests()
    found = {f"{tool} {part}": sanitizer.result() for (tool, part), sanitizer in zip(jobs, sanitizers, strict=True)}
    errors = sum(count or 0 for count in found.values())
    unfinished = [name for name, count in found.items() if count is None]
    if hashes(ROOT) != files:
        raise SystemExit("sources changed during the run; nothing is recorded")
    entry.update(tests, sanitizer_errors=errors, unfinished=unfinished, files=files)
    output.write_text(json.dumps(entry, indent=1) + "\n")
    print(f"wrote {output}: {tests['passed']} passed, {tests['failed']} failed, {errors} sanitizer errors", *unfinished)
    return 1 if tests["failed"] or errors or unfinished else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the record with the sources; no GPU, no torch")
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to check")
    parser.add_argument("--output", type=Path, default=ROOT / RECORD, help="where to write the record")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end the sanitizer's runs after so long")
    options = parser.parse_args(arguments)
    return check(options.root) if options.check else record(options.output, options.minutes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
