"""torch.compile without a graph break: training and inference give what the eager model gives."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from torch_csb import CSBConv2d, CSBLinear


class Net(nn.Module):
    """Both layers, in both memory formats, and an activation that is fused and one that is not."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, **layout: Any) -> None:
        super().__init__()
        conv, first, second = nn.Conv2d(20, 40, 1, stride=2), nn.Linear(40, 70), nn.Linear(70, 10, bias=False)
        for layer in (conv, first, second):
            layer.weight.data *= torch.rand_like(layer.weight) < 0.3
            layer.to(device, dtype)
        self.conv = CSBConv2d.from_dense(conv, **layout)
        self.first = CSBLinear.from_dense(first, **layout)
        self.second = CSBLinear.from_dense(second, **layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.second(nn.functional.gelu(self.first(x)))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def step(model: nn.Module, run, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, the input's gradient and the parameters' gradients of one training step."""
    x = x.detach().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return [y.detach(), x.grad, *gradients]


def check(
    backend: str, device: str, memory_format: torch.memory_format, dynamic: bool | None = None, **layout: Any
) -> None:
    model = Net(device, **layout)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for batch in (3, 5) if dynamic else (3,):
        x = torch.randn(batch, 20, 6, 6, device=device).to(memory_format=memory_format)
        model.train()
        for got, want in zip(step(model, compiled, x), step(model, model, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_aot_eager(memory_format: torch.memory_format, device: str) -> None:
    check("aot_eager", device, memory_format)


@pytest.mark.parametrize("dynamic", [None, True])
def test_bitmaps(dynamic: bool | None, device: str) -> None:
    check("aot_eager", device, torch.contiguous_format, dynamic, encoding="bitmap")


def test_dynamic_batch(device: str) -> None:
    check("aot_eager", device, torch.contiguous_format, dynamic=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles its CPU kernels with g++")
def test_inductor(device: str) -> None:
    check("inductor", device, torch.contiguous_format)


def test_the_graph_holds_our_operators(device: str) -> None:
    """fullgraph alone would also pass if an operator were traced into something else."""
    model = Net(device)
    forward, backward = [], []

    def record(into: list[str]):
        def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
            into.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph

        return compiler

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=record(forward), bw_compiler=record(backward))
    x = torch.randn(3, 20, 6, 6, device=device, requires_grad=True)
    torch.compile(model, fullgraph=True, backend=backend)(x).sum().backward()
    assert sum("torch_csb.spmm." in target for target in forward) == 3
    assert sum("torch_csb.spmm_t." in target for target in backward) == 3
    assert sum("torch_csb.sddmm." in target for target in backward) == 3


def test_export(device: str) -> None:
    model = Net(device).eval()
    x = torch.randn(3, 20, 6, 6, device=device)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
