"""Loading a whole model: prepare() checks every tensor against it and changes nothing, apply() changes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _dense, _state
from torch_csb.nn._choice import shared_weights
from torch_csb.nn._layer import CSBLayer
from torch_csb.nn._tree import Place, places, put
from torch_csb.nn.sparsify import LAYERS


@dataclass
class Prepared:
    model: nn.Module
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    _plain: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)
    _layers: list[tuple[CSBLayer, _state.Incoming]] = field(default_factory=list)
    _replacements: list[tuple[Place, _state.Incoming]] = field(default_factory=list)

    def apply(self) -> None:
        # Without the versions, torch would take the state for one of its oldest and patch it up.
        self._plain._metadata = getattr(self.model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
        self.model.load_state_dict(self._plain, strict=False)
        for layer, incoming in self._layers:
            layer._adopt(incoming)
        for place, incoming in self._replacements:
            _replace(place, incoming)


@torch.no_grad()
def _replace(place: Place, incoming: _state.Incoming) -> None:
    module = place.module()
    weight = _dense.weight_parameter(module)
    layer = LAYERS[type(module)]._replacing(module, _copied(incoming.matrix, weight), move=True)
    layer._adopt(_state.Incoming(bias=incoming.bias))
    put(place, layer)
    weight.grad = None


def _copied(matrix: CSBMatrix, like: Tensor) -> CSBMatrix:
    """Tensors of their own, which no mapped file stands behind."""
    values = matrix.values.to(like.device, like.dtype, copy=True)
    arrays = (getattr(matrix, name).to(like.device, copy=True) for name in ("codes", "blk_ptr", "blk_pad", "units"))
    return CSBMatrix(values, *arrays, m=matrix.m, k=matrix.k, layout=matrix.layout)


def prepare(model: nn.Module, tensors: Mapping[str, Tensor]) -> Prepared:
    """Checks names, shapes, dtypes and every index of ``tensors`` (by full name) against ``model``.

    Raises:
        ValueError: naming the tensor and what is wrong with it.
    """
    prepared = Prepared(model)
    state = model.state_dict()
    handled: set[str] = set()
    read: dict[tuple[int, ...], _state.Incoming] = {}
    by_module = {id(place.module()): place for place in places(model, lambda module: type(module) in LAYERS)}
    shared = shared_weights(model)
    replaced: dict[int, _state.Incoming] = {}
    # A shared module appears once for each of its names.
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        keys = [prefix + array for array in _state.ARRAYS]
        if isinstance(module, CSBLayer):
            expected = _state.Expected.of(module)
        elif all(key in tensors and key not in state for key in keys):
            expected = _expected_of_dense(module, prefix, shared, found_place=id(module) in by_module)
        else:
            continue
        own = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        handled.update(prefix + key for key in own)
        handled.update(key for key in state if key.startswith(prefix))
        source = (id(module), *(id(own[key]) for key in sorted(own)))
        incoming = read.get(source)
        if incoming is None:
            incoming = read[source] = _state.read(own, expected, prefix)
            if isinstance(module, CSBLayer):
                prepared._layers.append((module, incoming))
            else:
                replaced[id(module)] = incoming
        prepared.missing.extend(prefix + key for key in incoming.missing)
        prepared.unexpected.extend(prefix + key for key in incoming.unexpected)
    prepared._replacements = [(by_module[i], incoming) for i, incoming in replaced.items()]
    _prepare_plain(prepared, state, tensors, handled)
    return prepared


def _expected_of_dense(module: Any, prefix: str, shared: Mapping[int, str], *, found_place: bool) -> _state.Expected:
    kind = type(module).__name__
    weight = _dense.weight_parameter(module)
    if reason := _dense.obstacle(module) or shared.get(id(weight)):
        raise ValueError(f"{prefix}values: the file holds a CSB layer, and this {kind} can't become one: {reason}")
    if not found_place:
        csb = LAYERS[type(module)].__name__
        raise ValueError(
            f"values: the model itself is an nn.{kind}, which can't be replaced in place; "
            f"load into torch_csb.{csb}.from_dense(model)"
        )
    m, k = weight.shape[:2]
    has_bias = _dense.bias_parameter(module) is not None
    # The layout would serve to pack a dense weight, and the file holds a packed one.
    return _state.Expected(m, k, tuple(weight.shape), has_bias, Layout.of_block_size(64), weight.device)


def _prepare_plain(
    prepared: Prepared, state: Mapping[str, object], tensors: Mapping[str, Tensor], handled: set[str]
) -> None:
    for key, current in state.items():
        if key in handled:
            continue
        if key not in tensors:
            prepared.missing.append(key)
            continue
        tensor = tensors[key]
        if isinstance(current, Tensor):
            _check(key, current, tensor)
        prepared._plain[key] = tensor
    prepared.unexpected.extend(key for key in tensors if key not in state and key not in handled)


def _check(key: str, current: Tensor, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{key}: expected a tensor, got {type(tensor).__name__}")
    # Copying these would fail only when others are copied already.
    if tensor.layout != current.layout or (tensor.is_meta and not current.is_meta):
        raise ValueError(f"{key}: expected {current.layout} with data, got {tensor.layout} on {tensor.device}")
    if current.shape != tensor.shape:
        raise ValueError(f"{key}: expected shape {tuple(current.shape)}, got {tuple(tensor.shape)}")
    for kind in ("is_floating_point", "is_complex"):
        if getattr(current, kind)() != getattr(tensor, kind)():
            raise ValueError(f"{key}: expected {current.dtype} or a dtype of its kind, got {tensor.dtype}")
