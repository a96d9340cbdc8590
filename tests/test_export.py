"""torch.export and AOTInductor: programs that are saved, loaded, trained, and run without this package."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transform_cases import Dense, Sparse, pruned

from torch_csb import CSBLinear, CSBMatrix, _load, ops

BATCHES = (1, 2, 7, 64)


def net(device: str) -> Sparse:
    return Sparse(Dense(device, torch.float32)).to(device)


def images(device: str, n: int = 4, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.randn(n, 6, 3, 2, device=device).to(memory_format=memory_format)


def export(model: nn.Module, device: str, strict: bool = False) -> ExportedProgram:
    shapes = {"x": {0: Dim("batch", min=1, max=4096)}}
    return torch.export.export(model, (images(device),), dynamic_shapes=shapes, strict=strict)


def operators(program: ExportedProgram) -> Counter[str]:
    nodes = program.graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function" and "csb" in str(node.target))


def check(run: nn.Module, model: nn.Module, device: str) -> None:
    with torch.no_grad():
        for n in BATCHES:
            x = images(device, n)
            torch.testing.assert_close(run(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_dynamic_batch(strict: bool, device: str) -> None:
    model = net(device).eval()
    program = export(model, device, strict)
    check(program.module(), model, device)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(device, 3, memory_format)
        torch.testing.assert_close(program.module()(x), model(x))


def test_the_arrays_are_parameters_and_buffers_of_the_program(device: str) -> None:
    """A constant would be a second copy of the weight in the file, and a new mask could not be loaded into it."""
    program = export(net(device), device)
    signature = program.graph_signature
    assert {name for name in signature.parameters if name.endswith("values")} == {
        f"{layer}.values" for layer in ("conv", "first", "second")
    }
    assert {"first.codes", "first.blk_ptr", "first.blk_pad"} <= set(program.state_dict)
    assert "first.units" in signature.non_persistent_buffers
    assert not signature.lifted_tensor_constants


def test_save_and_load(device: str) -> None:
    model = net(device).eval()
    file = io.BytesIO()
    torch.export.save(export(model, device), file)
    file.seek(0)
    loaded = torch.export.load(file)
    check(loaded.module(), model, device)
    other = net(device).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    module = loaded.module()
    module.load_state_dict(other.state_dict(), strict=False)
    check(module, other, device)


def test_an_exported_program_trains(device: str) -> None:
    model = net(device)
    module = export(model, device).module()
    x = images(device).requires_grad_()
    got = torch.autograd.grad(module(x).square().sum(), (x, *module.parameters()))
    names = [name for name, _ in module.named_parameters()]
    want = torch.autograd.grad(model(x).square().sum(), (x, *(model.get_parameter(name) for name in names)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_decomposed_it_holds_our_three_operators(device: str) -> None:
    program = export(net(device).eval(), device)
    lowered = program.run_decompositions()
    assert operators(lowered) == {"torch_csb.spmm.default": 3}
    check(lowered.module(), program.module(), device)
    w = CSBMatrix.from_dense(torch.randn(20, 30, device=device), block_size=16)

    class Both(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return ops.spmm_t(w, a), ops.sddmm(w, a, b)

    a, b = torch.randn(5, 20, device=device), torch.randn(5, 30, device=device)
    both = torch.export.export(Both(), (a, b)).run_decompositions()
    assert operators(both) == {"torch_csb.spmm_t.default": 1, "torch_csb.sddmm.default": 1}
    torch.testing.assert_close(both.module()(a, b), Both()(a, b))


def run_with_torch_alone(lines: list[str], *arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "\n".join(["import sys, torch", *lines]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def run_without_the_package(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """In a process that imports torch alone and loads the compiled operators."""
    lines = [f"torch.ops.load_library({str(_load.library_path())!r})", code]
    lines += ["for x, y in torch.load(sys.argv[1]): torch.testing.assert_close(run(x), y)"]
    lines += ["assert 'torch_csb' not in sys.modules"]
    return run_with_torch_alone(lines, *arguments)


def test_the_library_alone_runs_a_decomposed_program(tmp_path: Path) -> None:
    model = net("cpu").eval()
    torch.export.save(export(model, "cpu").run_decompositions(), tmp_path / "net.pt2")
    with torch.no_grad():
        torch.save([(x, model(x)) for x in (images("cpu", n) for n in BATCHES)], tmp_path / "pairs.pt")
    done = run_without_the_package(
        "run = torch.export.load(sys.argv[2]).module()", tmp_path / "pairs.pt", tmp_path / "net.pt2"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
def test_aot_inductor_package_runs_with_the_library_alone(tmp_path: Path) -> None:
    model = nn.Sequential(
        CSBLinear.from_dense(pruned(nn.Linear(20, 33)), activation="relu"),
        CSBLinear.from_dense(pruned(nn.Linear(33, 5, bias=False)), block_size=16),
    ).eval()
    program = torch.export.export(model, (torch.randn(4, 20),), dynamic_shapes=({0: Dim("batch", min=1, max=4096)},))
    cheap = {"compile_wrapper_opt_level": "O0", "precompile_headers": False}
    known = torch._inductor.config.aot_inductor
    options = {f"aot_inductor.{name}": value for name, value in cheap.items() if hasattr(known, name)}
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "net.pt2"), inductor_configs=options
    )
    with torch.no_grad():
        torch.save([(x, model(x)) for x in (torch.randn(n, 20) for n in BATCHES)], tmp_path / "pairs.pt")
    done = run_without_the_package(
        "run = torch._inductor.aoti_load_package(sys.argv[2])", tmp_path / "pairs.pt", Path(package)
    )
    if done.returncode < 0 and loading_a_dense_package_dies(tmp_path / "dense.pt2"):
        pytest.skip("this build of torch dies of any package of AOTInductor, nn.Linear's too")
    assert done.returncode == 0, done.stderr


def loading_a_dense_package_dies(path: Path) -> bool:
    program = torch.export.export(nn.Linear(20, 33).eval(), (torch.randn(4, 20),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return run_with_torch_alone(["torch._inductor.aoti_load_package(sys.argv[1])"], Path(package)).returncode < 0
