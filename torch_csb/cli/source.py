"""The CSB layers of a file or of a model that Python can import."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torch_csb._files.read import Contents, read
from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _state
from torch_csb.nn._layer import CSBLayer


@dataclass(frozen=True)
class Source:
    """What `inspect` looks at.

    Attributes:
        layers: each CSB layer's weight by its name, shared ones once.
        shapeless: names of layers whose file doesn't say how large they are.
        rest: bytes of all other tensors, tied ones once.
    """

    layers: dict[str, CSBMatrix]
    shapeless: tuple[str, ...]
    rest: int


def open_source(text: str) -> Source:
    """FILE (safetensors, or a state_dict of torch.save) or MODULE (``package.module:name`` of a model, or of a callable
    that makes one).

    Raises:
        FileNotFoundError, ImportError: there is no such thing.
        ValueError: a damaged file, or something that is no model.
    """
    path = Path(text)
    if path.exists() or ":" not in text:
        if not path.is_file():
            raise FileNotFoundError(f"{text}: no such file (a model is named as package.module:name)")
        try:
            return _of_file(read(path))
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from error
    return _of_model(import_model(text))


def import_model(text: str) -> nn.Module:
    module_name, _, attribute = text.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ImportError(
            f"{text}: no module {error.name!r}; start where Python can import it, or add its folder to PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ImportError(f"{text}: {module_name} has no {attribute!r}; expected package.module:name")
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(f"{text}: expected a callable that needs no arguments: {error}") from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"{text}: expected an nn.Module or a callable that returns one, got {type(found).__name__}")
    return found


def _of_model(model: nn.Module) -> Source:
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, CSBLayer)]
    for name, layer in named:
        if layer.values.is_meta:
            raise ValueError(f"{name}: expected data, got a layer on the meta device; load its weights first")
    layers = {name or "(model)": layer.matrix.to("cpu") for name, layer in named}
    own = {id(layer.values) for _, layer in named}
    own |= {id(buffer) for _, layer in named for buffer in layer.buffers(recurse=False)}
    rest = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in own}
    return Source(layers, (), _bytes(rest.values()))


def csb_prefixes(tensors: dict[str, Any]) -> list[str]:
    """Of the CSB layers of a state_dict: ``"fc."`` for a layer named fc."""
    prefixes = [name.removesuffix("codes") for name in tensors if name == "codes" or name.endswith(".codes")]
    return [prefix for prefix in prefixes if all(prefix + array in tensors for array in _state.ARRAYS)]


def shapes_of(metadata: dict[str, str]) -> dict[str, tuple[int, int]]:
    """(m, k) of each CSB layer, as far as the file tells."""
    try:
        shapes = json.loads(metadata.get("shapes", "{}"))
        return {name: (int(m), int(k)) for name, (m, k) in shapes.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"metadata: shapes: expected two sizes for each layer: {error}") from error


def _of_file(contents: Contents) -> Source:
    tensors, shapes = contents.tensors, shapes_of(contents.metadata)
    layers: dict[str, CSBMatrix] = {}
    shapeless, handled = [], set()
    for prefix in csb_prefixes(tensors):
        arrays = {array: tensors[prefix + array] for array in _state.ARRAYS}
        handled |= {id(tensor) for tensor in arrays.values()}
        name = prefix.removesuffix(".")
        if prefix + "codes" in contents.aliases:
            continue
        if name not in shapes:
            shapeless.append(name)
            continue
        m, k = shapes[name]
        expected = _state.Expected(m, k, (m, k), False, Layout.of_block_size(64), None)
        layers[name or "(model)"] = _state.read(arrays, expected, prefix).matrix
    rest = {id(tensor): tensor for tensor in tensors.values() if isinstance(tensor, Tensor)}
    return Source(layers, tuple(shapeless), _bytes(tensor for i, tensor in rest.items() if i not in handled))


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
