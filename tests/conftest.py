from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch starts its threads: where processes share cores, threads that spin while they wait make small tests
# many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from ranks import Ranks

# Graphs that torch.compile kept of other versions of the operators would call them with other arguments.
CACHE = tempfile.TemporaryDirectory(prefix="torch_csb-compiled-", ignore_cleanup_errors=True)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", CACHE.name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dlmc",
        default=os.environ.get("TORCH_CSB_DLMC"),
        help="folder with .smtx or .smtx.gz files of the Deep Learning Matrix Collection (or set TORCH_CSB_DLMC)",
    )


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def pytest_report_header() -> str:
    return f"devices under test: {', '.join(DEVICES)}"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, for NCCL")
        ),
    ],
)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Two processes, over gloo on the CPU or NCCL on two GPUs."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    processes = Ranks(request.param)
    yield processes
    processes.stop(at_once=False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dlmc(request: pytest.FixtureRequest) -> list[Path]:
    """Files of the collection, smallest first."""
    folder = request.config.getoption("--dlmc")
    if not folder:
        pytest.skip("no DLMC folder: give --dlmc PATH or set TORCH_CSB_DLMC")
    files = sorted(Path(folder).rglob("*.smtx*"), key=lambda path: (path.stat().st_size, path))
    assert files, f"no .smtx file under {folder}"
    return files
