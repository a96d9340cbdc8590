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
from torch_csb.nn import _deferred, _dense, _masks, _state, _ties
from torch_csb.nn._choice import shared_weights
from torch_csb.nn._layer import CSBLayer
from torch_csb.nn._masks import layer_type
from torch_csb.nn._shard import distributed_like
from torch_csb.nn._tree import Place, places, put
from torch_csb.nn.sparsify import LAYERS


@dataclass
class Prepared:
    model: nn.Module
    # Where what is on the meta device goes.
    device: torch.device
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    _plain: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)
    _layers: list[tuple[CSBLayer, _state.Incoming]] = field(default_factory=list)
    _replacements: list[tuple[Place, _state.Incoming]] = field(default_factory=list)

    def apply(self) -> None:
        ties = _ties.meta_ties(self.model)
        state = self.model.state_dict()
        meta = {key for key in self._plain if isinstance(state.get(key), Tensor) and state[key].is_meta}
        # Data can't be copied to the meta device, and must not replace what optimizers know elsewhere.
        for assign in (False, True) if meta else (False,):
            part = OrderedDict((key, t) for key, t in self._plain.items() if (key in meta) == assign)
            if assign:
                part = OrderedDict((key, t.to(self.device, state[key].dtype, copy=True)) for key, t in part.items())
            # Without the versions, torch would take the state for one of its oldest and patch it up.
            part._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
            self.model.load_state_dict(part, strict=False, assign=assign)
        for layer, incoming in self._layers:
            meta_layer = layer.values.is_meta
            layer._adopt(self._filled(incoming, layer.values) if meta_layer else incoming, assign=meta_layer)
        for place, incoming in self._replacements:
            self._replace(place, incoming)
        _ties.tie(ties)

    @torch.no_grad()
    def _replace(self, place: Place, incoming: _state.Incoming) -> None:
        module = place.module()
        weight = _dense.weight_parameter(module)
        incoming = self._filled(incoming, weight)
        layer = LAYERS[layer_type(module)]._replacing(module, incoming.matrix, move=True)
        layer._adopt(_state.Incoming(bias=incoming.bias), assign=weight.is_meta)
        put(place, layer)
        weight.grad = None

    def _filled(self, incoming: _state.Incoming, like: Tensor) -> _state.Incoming:
        """Tensors of their own, which no mapped file stands behind, in the dtype of ``like`` and where it is."""
        device = self.device if like.is_meta else like.device
        matrix, bias = incoming.matrix, incoming.bias
        if matrix is not None:
            values = matrix.values.to(device, like.dtype, copy=True)
            arrays = (getattr(matrix, name).to(device, copy=True) for name in ("codes", "blk_ptr", "blk_pad", "units"))
            matrix = CSBMatrix(values, *arrays, m=matrix.m, k=matrix.k, layout=matrix.layout)
        if bias is not None:
            bias = bias.to(device, like.dtype, copy=True)
        return _state.Incoming(matrix, bias)


def prepare(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> Prepared:
    """Checks names, shapes, dtypes and every index of ``tensors`` (by full name) against ``model``.

    Raises:
        ValueError: naming the tensor and what is wrong with it.
    """
    prepared = Prepared(model, device or torch.device("cpu"))
    state = model.state_dict()
    handled: set[str] = set()
    read: dict[tuple[int, ...], _state.Incoming] = {}
    by_module = {id(place.module()): place for place in places(model, lambda module: layer_type(module) in LAYERS)}
    shared = shared_weights(model)
    replaced: dict[int, _state.Incoming] = {}
    # A shared module appears once for each of its names.
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        keys = [prefix + array for array in _state.ARRAYS]
        if isinstance(module, CSBLayer):
            expected = None
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
            if expected is None:
                incoming = module._read_state(own, prefix, assign=module.values.is_meta)
                prepared._layers.append((module, incoming))
            else:
                incoming = replaced[id(module)] = _state.read(own, expected, prefix)
            read[source] = incoming
        prepared.missing.extend(prefix + key for key in incoming.missing)
        prepared.unexpected.extend(prefix + key for key in incoming.unexpected)
    prepared._replacements = [(by_module[i], incoming) for i, incoming in replaced.items()]
    _prepare_plain(prepared, state, tensors, handled)
    return prepared


def _expected_of_dense(module: Any, prefix: str, shared: Mapping[int, str], *, found_place: bool) -> _state.Expected:
    kind = layer_type(module).__name__
    weight = _dense.weight_parameter(module)
    if reason := _dense.obstacle(module, meta=True) or shared.get(id(weight)):
        raise ValueError(f"{prefix}values: the file holds a CSB layer, and this {kind} can't become one: {reason}")
    if not found_place:
        csb = LAYERS[layer_type(module)].__name__
        raise ValueError(
            f"values: the model itself is an nn.{kind}, which can't be replaced in place; "
            f"load into torch_csb.{csb}.from_dense(model)"
        )
    groups = getattr(module, "groups", 1)
    m, k = weight.shape[0], weight.shape[1] * groups
    has_bias = _dense.bias_parameter(module) is not None
    # The layout would serve to pack a dense weight, and the file holds a packed one.
    return _state.Expected(m, k, tuple(weight.shape), has_bias, Layout.of_block_size(64), weight.device, groups)


def _prepare_plain(
    prepared: Prepared, state: Mapping[str, object], tensors: Mapping[str, Tensor], handled: set[str]
) -> None:
    tied = _ties.ties(prepared.model)
    for key, current in state.items():
        if key in handled:
            continue
        masked = _masks.product(tensors, key) if key not in tensors else None
        if masked is None and key not in tensors:
            # Files of others hold a tied tensor under one of its names alone.
            if not any(other in tensors for other in tied.get(key, ())):
                prepared.missing.append(key)
            continue
        tensor, used = masked or (tensors[key], [])
        handled.update(used)
        if isinstance(current, Tensor):
            _check(key, current, tensor)
            tensor = distributed_like(tensor, current)
        prepared._plain[key] = tensor
    prepared.missing.extend(_deferred.meta_buffers(prepared.model))
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
