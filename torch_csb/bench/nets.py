"""The nets of `bench model` and `bench step`: two built-in ones, a user's by import path, and their pruned variants."""

from __future__ import annotations

import copy
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_csb.nn import Report, sparsify_
from torch_csb.nn._choice import Choice
from torch_csb.nn._dense import is_pruned
from torch_csb.nn._tree import places

# Images whose activations set the statistics of the batch norms.
CALIBRATION_BATCH = 4


class Net(NamedTuple):
    """``make()`` gives a model that takes ``[batch, *sample]``; the same seed gives the same model."""

    name: str
    make: Callable[[], nn.Module]
    sample: tuple[int, ...]

    def example(self, batch: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
        """Normal inputs for ``batch`` samples."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(batch, *self.sample, device=device, generator=generator).to(dtype)


def mlp(width: int = 4096, depth: int = 4) -> nn.Sequential:
    """``depth`` square linear layers with ReLU between them, as wide as those of a transformer."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        # torch's own initialisation shrinks the activations in every layer until only the last bias is left of them.
        nn.init.kaiming_normal_(linear.weight)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mobilenet(widths: tuple[tuple[int, int], ...] | None = None, classes: int = 1000) -> nn.Sequential:
    """MobileNetV1 (Howard et al. 2017): a 3x3 stem, 13 pairs of a depthwise 3x3 and a 1x1 convolution, a classifier.

    Args:
        widths: (channels, stride) of each pair, the stem giving half the channels of the first.
    """
    if widths is None:
        widths = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))
    channels = widths[0][0] // 2
    layers = [nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    for width, stride in widths:
        depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        pointwise = nn.Conv2d(channels, width, 1, bias=False)
        layers += [depthwise, nn.BatchNorm2d(channels), nn.ReLU(), pointwise, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


NETS = {net.name: net for net in (Net("mlp", mlp, (4096,)), Net("mobilenet", mobilenet, (3, 224, 224)))}


def from_import_path(path: str, sample: tuple[int, ...] | None) -> Net:
    """The net that ``package.module:function`` makes; the current directory is searched too.

    Raises:
        ValueError: with a sentence on what is missing or wrong; from ``make()`` too.
    """
    module_name, colon, function_name = path.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"--model: expected package.module:function, got {path!r}")
    if sample is None:
        raise ValueError("--input: expected the shape of one sample beside --model, such as 3x224x224, got nothing")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"--model: {module_name!r} can't be imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--model: expected a function {function_name!r} in {module_name!r}, got {function!r}")

    def make() -> nn.Module:
        model = function()
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model: expected {path} to return an nn.Module, got {type(model).__name__}")
        # sparsify_ replaces a layer inside another module.
        return nn.Sequential(model) if isinstance(model, (nn.Linear, nn.Conv2d)) else model

    return Net(path, make, sample)


def parse_shape(text: str) -> tuple[int, ...]:
    """``"3x224x224"`` as ``(3, 224, 224)``."""
    try:
        shape = tuple(int(size) for size in text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"--input: expected positive sizes such as 3x224x224, got {text!r}")
    return shape


class Pruned(NamedTuple):
    model: nn.Module
    sparsity: float  # as asked for, or the share of zeros found in a model that came pruned


@torch.no_grad()
def make_pruned(net: Net, sparsity: float, device: str, seed: int = 0) -> Pruned:
    """The net on its device, in eval mode and float32 (or what its author chose), pruned by magnitude unless it came
    pruned."""
    torch.manual_seed(seed)
    model = net.make().to(device).eval()
    found = would_convert(model, device)
    if found.converted:
        elements = sum(m * k for m, k in (row.shape for row in found.converted))
        kept = sum((1 - row.sparsity) * row.shape[0] * row.shape[1] for row in found.converted)
        return Pruned(model, round(1 - kept / elements, 4))
    prune_by_magnitude(model, sparsity)
    if net.name in NETS:
        calibrate(model, net.example(CALIBRATION_BATCH, device, torch.float32, seed + 1))
    return Pruned(model, sparsity)


@torch.no_grad()
def prune_by_magnitude(model: nn.Module, sparsity: float) -> None:
    """Masks, by ``torch.nn.utils.prune``, the smallest share ``sparsity`` of each weight that sparsify_ can convert."""
    found = places(model, lambda module: isinstance(module, (nn.Linear, nn.Conv2d)))
    choice = Choice(model, found, None, ())
    for place in found:
        layer = place.module()
        if choice.obstacle(place, layer) is not None:
            continue
        size = layer.weight.abs().flatten()
        # prune.l1_unstructured keeps the same elements, and sorts the removed ones first, for ten times as long.
        kept = size.topk(size.numel() - round(sparsity * size.numel()), sorted=False).indices
        mask = torch.zeros_like(size).index_fill_(0, kept, 1).view_as(layer.weight)
        prune.custom_from_mask(layer, "weight", mask)


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    """Sets the statistics of batch norms to those of ``x``; untrained ones let activations vanish with the depth."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(x)
    model.eval()


def would_convert(model: nn.Module, device: str) -> Report:
    """sparsify_'s report; its warning that nothing is pruned yet is no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return sparsify_(model, target=device, dry_run=True, progress=False)


def converted_layers(report: Report, net: str) -> dict[str, tuple[int, int]]:
    """(m, k) of each layer that would be converted, by name. Raises ValueError where there is none."""
    if not report.converted:
        raise ValueError(f"{net}: sparsify_ would convert no layer, so there is nothing to compare\n{report}")
    return {row.name: row.shape for row in report.converted}


@torch.no_grad()
def make_variants(model: nn.Module, layers: dict[str, tuple[int, int]], device: str) -> dict[str, nn.Module]:
    """The same pruned model three times: ``dense`` holds zeros, ``masked`` multiplies weight_orig by weight_mask on
    every forward, ``csb`` went through sparsify_."""
    forget_masked_weights(model)
    masked = copy.deepcopy(model)
    for name in layers:
        layer = masked.get_submodule(name)
        if not is_pruned(layer, "weight"):
            prune.custom_from_mask(layer, "weight", (layer.weight != 0).to(layer.weight.dtype))
    forget_masked_weights(masked)
    dense, csb = copy.deepcopy(masked), copy.deepcopy(masked)
    for layer, name in _pruned_tensors(dense):
        prune.remove(layer, name)
    sparsify_(csb, target=device, progress=False)
    return {"dense": dense, "masked": masked, "csb": csb}


def forget_masked_weights(model: nn.Module) -> None:
    """Drops the products orig * mask of the last forward: deepcopy refuses them, and the next forward makes its own."""
    for layer, name in _pruned_tensors(model):
        vars(layer).pop(name, None)


def _pruned_tensors(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, name) for module in model.modules() for name in ("weight", "bias") if is_pruned(module, name)]


@torch.no_grad()
def layer_inputs(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What each layer gets when the model sees x (the first time, where it is called more often).

    Raises:
        ValueError: the model refuses x, returns no tensor or leaves a layer out.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, arguments[0].clone())  # what follows may work in place

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        y = model(x)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"--input: the model refuses {tuple(x.shape)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(y, Tensor):
        raise ValueError(f"--model: expected it to return one tensor, got {type(y).__name__}")
    if missing := [name for name in names if name not in inputs]:
        raise ValueError(f"--model: expected its forward to call {missing[0]}, which it doesn't")
    return inputs


def bytes_held(*tensors: Tensor) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weight_bytes(module: nn.Module) -> int:
    """Parameters and buffers: masks, and the pattern and plan of CSB, among them."""
    return bytes_held(*module.parameters(), *module.buffers())
