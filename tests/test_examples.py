"""Every example runs as a user would run it, and so does every Python block of README.md and docs/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAPERS = ("README.md", "docs/format.md", "docs/numerics.md", "docs/pruning.md", "docs/integration.md")


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # The package of this checkout, also where it is not installed; the working folder is a scratch one.
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=600
    )
    assert done.returncode == 0, f"{arguments[0]} failed:\n{done.stdout}\n{done.stderr}"
    return done


def python_blocks(paper: str) -> list[str]:
    return PYTHON_BLOCK.findall((ROOT / paper).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("quickstart.py", "round trips are exact"),
        ("fine_tune.py", "loaded: bit-equal; densified: equal within rounding"),
        ("conv1x1.py", "fused silu agrees"),
    ],
)
def test_example_runs(example: str, said: str, tmp_path: Path) -> None:
    assert said in run_python(str(ROOT / "examples" / example), cwd=tmp_path).stdout


def test_every_example_is_tested() -> None:
    tested = {"quickstart.py", "fine_tune.py", "conv1x1.py", "demo_digits.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == tested


def test_demo_prints_one_table_and_draws_it(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")
    pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
    pytest.importorskip("tqdm", reason="the demo shows its progress with tqdm")
    demo = str(ROOT / "examples" / "demo_digits.py")
    done = run_python(demo, "--quick", "--device", "cpu", cwd=tmp_path)
    for row in ("accuracy", "weights", "gradients", "optimizer state", "Linear 1024 → 512", "1x1 conv", "whole net"):
        assert row in done.stdout, f"no row {row!r} in\n{done.stdout}"
    assert "outputs bit-equal" in done.stdout
    picture = tmp_path / "build" / "demo" / "digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "latency" in done.stderr, "the progress bars go to stderr"


def test_readme_starts_in_ten_lines(tmp_path: Path) -> None:
    start = python_blocks("README.md")[0]
    assert len([line for line in start.splitlines() if line.strip()]) <= 10
    assert "sparsify_" in start
    run_python("-c", start, cwd=tmp_path)


@pytest.mark.parametrize("paper", PAPERS)
def test_python_blocks_of_papers_run(paper: str, tmp_path: Path) -> None:
    blocks = python_blocks(paper)
    assert blocks, f"{paper} has no Python block"
    run_python("-c", "\n".join(blocks), cwd=tmp_path)
