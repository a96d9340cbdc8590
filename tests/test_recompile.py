"""How often torch.compile compiles: as often as for nn.Linear, and never for another batch where that is dynamic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from cases import packing
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from transform_cases import pruned

from torch_csb import CSBLinear
from torch_csb.nn import DYNAMIC_SOURCES, share_code_between_layers

LAYERS = 4


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def dense_layers(device: str) -> list[nn.Linear]:
    """Of one shape, but with 10, 20, 30 … % entries."""
    layers = [nn.Linear(48, 48) for _ in range(LAYERS)]
    for i, layer in enumerate(layers):
        layer.weight.data *= torch.rand(48, 48) < 0.1 * (i + 1)
    return [layer.to(device) for layer in layers]


def sparse(layers: Iterable[nn.Linear], blocks: int | str = 16) -> list[CSBLinear]:
    converted = [CSBLinear.from_dense(layer, **packing(blocks)) for layer in layers]
    assert len({layer.values.numel() for layer in converted}) == LAYERS
    return converted


def compilations(models: Sequence[nn.Module], inputs: Sequence[Tensor], **options) -> int:
    """Graphs that the models compile together, over all inputs, in training and without gradients."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = [torch.compile(model, backend=counter, fullgraph=True, **options) for model in models]
    for x in inputs:
        for run in compiled:
            run(x)
    assert not counters["graph_break"]
    return counter.frame_count


def batches(device: str, *sizes: int) -> list[Tensor]:
    return [torch.randn(size, 48, device=device) for size in sizes]


def test_a_model_is_one_graph(device: str) -> None:
    dense = dense_layers(device)
    for layers in (dense, sparse(dense)):
        assert compilations([nn.Sequential(*layers)], batches(device, 5)) == 1


@pytest.mark.parametrize("sizes", [(3, 5, 7, 64), (1, 3, 5), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_other_batches_recompile_as_for_linear(sizes: tuple[int, ...], dynamic: bool | None, device: str) -> None:
    dense = dense_layers(device)
    counts = [
        compilations([nn.Sequential(*layers)], batches(device, *sizes), dynamic=dynamic)
        for layers in (dense, sparse(dense))
    ]
    assert counts[1] == counts[0]
    if dynamic and 1 not in sizes:  # the compiler specialises a batch of one
        assert counts[1] == 1


def test_a_batch_marked_dynamic_never_recompiles(device: str) -> None:
    inputs = batches(device, 3, 5, 7, 64)
    torch._dynamo.mark_dynamic(inputs[0], 0)  # an error, should the graph specialise it
    assert compilations([nn.Sequential(*sparse(dense_layers(device)))], inputs) == 1


def test_trained_values_do_not_recompile(device: str) -> None:
    model = nn.Sequential(*sparse(dense_layers(device)))
    optimizer = torch.optim.AdamW(model.parameters())
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(torch.randn(5, 48, device=device)).square().sum().backward()
        optimizer.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("blocks", [16, "bitmap"])
def test_layers_compiled_one_by_one_share_their_code(blocks: int | str, device: str) -> None:
    dense = dense_layers(device)
    inputs = batches(device, 5)
    assert compilations(dense, inputs) == 1
    assert compilations(sparse(dense, blocks), inputs) == 1
    models = [nn.Sequential(layer, nn.ReLU()) for layer in sparse(dense, blocks)]
    assert compilations(models, inputs) == 1


def test_code_is_shared_only_while_the_compiler_is_told(device: str) -> None:
    """Other numbers of entries are other sizes, and the compiler takes a parameter's sizes for constants."""
    with torch.compiler.config.patch(dynamic_sources=""):
        assert compilations(sparse(dense_layers(device)), batches(device, 5)) > 1


def test_the_compiler_is_told_once_and_forgets_nothing() -> None:
    mine = r"L\['self'\]\.scale"
    with torch.compiler.config.patch(dynamic_sources=mine):
        for _ in range(2):
            share_code_between_layers()
            assert torch.compiler.config.dynamic_sources == f"{mine},{DYNAMIC_SOURCES}"


@pytest.mark.parametrize("entries", [0, 1, 9])
def test_a_layer_with_hardly_an_entry_compiles(entries: int, device: str) -> None:
    """The compiler takes sizes of 0 and 1 for constants, also where it is told that sizes vary: layers without any
    entry share one compilation, the others another."""
    layers = []
    for keep in (entries, 2 * entries, 900):
        dense = nn.Linear(48, 48)
        dense.weight.data.view(-1)[keep:] = 0
        layers.append(CSBLinear.from_dense(dense.to(device)))
    for models in (layers, [nn.Sequential(*layers)]):
        alone = entries == 0 and models is layers
        assert compilations(models, batches(device, 5, 6)) == (4 if alone else 2)  # a second batch makes it dynamic
        for model in models:
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            x = torch.randn(5, 48, device=device)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("blocks", [16, "bitmap"])
def test_shared_code_computes_each_layer(blocks: int | str, device: str) -> None:
    layers = sparse(dense_layers(device), blocks)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        x = torch.randn(5, 48, device=device, requires_grad=True)
        cotangent = torch.randn(5, 48, device=device)
        tensors = (x, layer.values, layer.bias)
        got, want = (torch.autograd.grad(run(x), tensors, cotangent) for run in (compiled, layer))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count == 1


def test_another_pattern_of_the_same_size_does_not_recompile(device: str) -> None:
    """What load_state_dict or a mask update brings."""
    dense = pruned(nn.Linear(48, 48)).to(device)
    layer = CSBLinear.from_dense(dense, block_size=64)
    moved = nn.Linear(48, 48, device=device)
    moved.weight.data = dense.weight.data.roll(5, 1)
    other = CSBLinear.from_dense(moved, block_size=64)
    assert other.values.shape == layer.values.shape and not torch.equal(other.codes, layer.codes)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, 48, device=device)
    torch.testing.assert_close(compiled(x), layer(x))
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), moved(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
