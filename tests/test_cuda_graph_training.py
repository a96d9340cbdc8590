"""Training inside CUDA graphs: a whole step, make_graphed_callables, and torch.compile's own graphs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transform_cases import pruned

from torch_csb import CSBConv2d, CSBLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def nothing_left_to_collect() -> None:
    """What other tests left (events, graphs) must not be destroyed in the middle of a capture, which would end it."""
    gc.collect()
    torch.cuda.synchronize()


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A fused activation, one that is not fused in training, and a layer without a bias."""
    sizes = ((256, 320), (320, 320), (320, 64))
    options = ({"activation": "relu"}, {"activation": "gelu"}, {})
    layers = [
        CSBLinear.from_dense(pruned(nn.Linear(k, m, bias=i < 2)).to("cuda", dtype), **options[i])
        for i, (k, m) in enumerate(sizes)
    ]
    return nn.Sequential(*layers)


def step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients, cloned: a graph's outputs are overwritten by its next replay."""
    x = x.detach().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    got = [y.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return got


def assert_near(got: list[Tensor], want: list[Tensor]) -> None:
    """Within float32's rounding; a stale replay or a lost gradient is off by the whole value."""
    for a, b in zip(got, want, strict=True):
        assert ((a - b).norm() <= 1e-5 * b.norm()).item()
        assert b.norm() > 0


@pytest.mark.parametrize("batch", [8, 96, 1024])
def test_make_graphed_callables(batch: int) -> None:
    model = mlp()
    eager = copy.deepcopy(model)
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn(batch, 256, device="cuda", requires_grad=True),))
    for _ in range(3):
        x = torch.randn(batch, 256, device="cuda")
        assert_near(step(graphed, model, x), step(eager, eager, x))
        with torch.no_grad():  # as an optimizer does, in place
            for parameters in zip(model.parameters(), eager.parameters(), strict=True):
                for parameter in parameters:
                    parameter.mul_(0.5)


def test_a_whole_training_step_is_one_graph() -> None:
    model = mlp()
    eager = copy.deepcopy(model)
    before = model[0].values.detach().clone()
    batches = [(torch.randn(64, 256, device="cuda"), torch.randn(64, 64, device="cuda")) for _ in range(6)]
    x, target = (tensor.clone() for tensor in batches[0])

    def make_step(net: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, capturable=True)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.mse_loss(net(x), target).backward()
            optimizer.step()

        return run

    def load(batch: tuple[Tensor, Tensor]) -> None:
        x.copy_(batch[0])
        target.copy_(batch[1])

    run, run_eager = make_step(model), make_step(eager)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:3]:
            load(batch)
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for batch in batches[3:]:
        load(batch)
        graph.replay()
    for batch in batches:
        load(batch)
        run_eager()
    torch.cuda.synchronize()
    assert_near([p.detach() for p in model.parameters()], [p.detach() for p in eager.parameters()])
    entries = model[0].matrix.is_entry
    assert (model[0].values[~entries] == 0).all()
    assert not torch.equal(model[0].values, before)


def test_amp_step_in_a_graph() -> None:
    model = mlp()
    eager = copy.deepcopy(model)
    x = torch.randn(64, 256, device="cuda")

    def run(net: nn.Module) -> list[Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            y = net(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(net.parameters()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(model)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(model)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert_near([t.detach().float() for t in captured], [t.detach().float() for t in run(eager)])


def assert_in_graphs() -> None:
    """The compiler may leave CUDA graphs out with a mere warning."""
    from torch._inductor.cudagraph_trees import get_manager

    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not counters["graph_break"]
    assert get_manager(torch.cuda.current_device(), create_if_none_exists=False) is not None


@pytest.fixture
def compiler() -> None:
    pytest.importorskip("triton")
    torch._dynamo.reset()
    counters.clear()


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = CSBConv2d.from_dense(pruned(nn.Conv2d(64, 256, 1)).cuda(), activation="relu")
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.conv(x).mean((2, 3)))


def test_reduce_overhead_trains(compiler: None) -> None:
    model = mlp()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):  # warm up, record, replay
        x = torch.randn(32, 256, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        assert_near(step(compiled, model, x), step(model, model, x))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
    assert_in_graphs()


def test_reduce_overhead_infers(compiler: None) -> None:
    model = Images().eval()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for _ in range(4):
                x = torch.randn(8, 64, 5, 5, device="cuda").to(memory_format=memory_format)
                torch.compiler.cudagraph_mark_step_begin()
                assert_near([compiled(x).clone()], [model(x)])
    assert_in_graphs()


def test_reduce_overhead_with_a_dynamic_batch(compiler: None) -> None:
    """One compilation, and a graph for each batch size that was seen."""
    model = mlp().eval()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n in (8, 24, 160) * 4:
            x = torch.randn(n, 256, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            assert_near([compiled(x).clone()], [model(x)])
    assert counters["stats"]["unique_graphs"] == 1
    assert_in_graphs()


def test_reduce_overhead_of_layers_that_share_code(compiler: None) -> None:
    layers = [CSBLinear.from_dense(pruned(nn.Linear(256, 256), seed).cuda()) for seed in range(3)]
    with torch.no_grad():
        compiled = [torch.compile(layer, mode="reduce-overhead", fullgraph=True) for layer in layers]
        for _ in range(4):
            for run, layer in zip(compiled, layers, strict=True):
                x = torch.randn(32, 256, device="cuda")
                torch.compiler.cudagraph_mark_step_begin()
                assert_near([run(x).clone()], [layer(x)])
    assert counters["stats"]["unique_graphs"] == 1
