"""Which weights of a state_dict become CSB layers, without the model that it belongs to."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_csb import convert
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _state
from torch_csb.nn._threshold import Threshold
from torch_csb.nn.report import Report, ReportRow

# Modules whose weight has the shape of nn.Linear's and is looked up, not multiplied.
_LOOKED_UP = ("embed*", "*embedding", "*embeddings", "emb", "*_emb", "wte", "wpe")


@dataclass(frozen=True)
class Options:
    """As in :func:`torch_csb.sparsify_`; ``include`` names weights that the guesses from names leave out."""

    min_sparsity: float | str = "auto"
    batch: int | None = None
    target: str = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()


@dataclass
class Converted:
    """``state`` has the arrays of a CSB layer in place of each converted weight, and no pruning mask any more."""

    state: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    report: Report = field(default_factory=Report)


@dataclass(frozen=True)
class _Weight:
    name: str
    tensor: Tensor
    mask: Tensor | None  # as nn.utils.prune keeps it

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.shape != self.tensor.shape:
            shapes = f"expected shape {tuple(self.tensor.shape)}, got {tuple(self.mask.shape)}"
            raise ValueError(f"{self.name}_mask: {shapes}")

    def value(self) -> Tensor:
        return self.tensor if self.mask is None else self.tensor * self.mask.to(self.tensor.dtype)


def convert_state(state: Mapping[str, Any], options: Options, names: Iterable[str] | None = None) -> Converted:
    """Converts one tensor after the other.

    Args:
        names: those of ``state``, where a caller wants to watch the progress.

    Raises:
        ValueError: a value is no tensor, or a mask doesn't fit.
    """
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}; take it out of the state_dict")
    result = Converted()
    choice = _Choice(state, options)
    packed: dict[tuple[object, ...], CSBMatrix] = {}
    for name in state if names is None else names:
        base = _pruned_base(state, name)
        if base is not None and name.endswith("_mask"):
            continue
        weight = _Weight(base or name, state[name], None if base is None else state[f"{base}_mask"])
        layer, part = _split(weight.name)
        matrix = None
        if part == "weight" and weight.tensor.dim() >= 2:
            key = (_identity(weight.tensor), None if weight.mask is None else _identity(weight.mask))
            row, matrix = choice.judge(weight, packed.get(key))
            result.report.rows.append(row)
        elif weight.tensor.dim() >= 2 and weight.tensor.is_floating_point():
            reason = "not a layer's weight: nn.Linear and nn.Conv2d call it weight"
            result.report.rows.append(_kept(weight, reason))
        if matrix is None:
            result.state[weight.name] = weight.value()
        else:
            packed[key] = matrix
            prefix = f"{layer}." if layer else ""
            result.state.update({prefix + array: getattr(matrix, array) for array in _state.ARRAYS[:-1]})
            result.state[f"{prefix}layout"] = matrix.layout.to_tensor()
            result.shapes[layer] = (matrix.m, matrix.k)
    return result


def _split(name: str) -> tuple[str, str]:
    layer, _, part = name.rpartition(".")
    return layer, part


def _pruned_base(state: Mapping[str, Any], name: str) -> str | None:
    """``"fc.weight"`` for the two tensors that nn.utils.prune keeps in its place."""
    for suffix in ("_orig", "_mask"):
        base = name.removesuffix(suffix)
        if base != name and f"{base}_orig" in state and f"{base}_mask" in state:
            return base
    return None


def _kept(weight: _Weight, reason: str, sparsity: float | None = None) -> ReportRow:
    size, shape = weight.tensor.numel() * weight.tensor.element_size(), tuple(weight.tensor.shape)
    return ReportRow(weight.name, f"{weight.tensor.dim()}-D", shape, sparsity, size, size, "kept", reason)


class _Choice:
    def __init__(self, state: Mapping[str, Any], options: Options) -> None:
        self._state, self._options = state, options
        self._threshold = Threshold(options.min_sparsity, options.batch, options.target)
        self._users: dict[tuple[object, ...], list[str]] = {}
        for name, tensor in state.items():
            if tensor.numel() and not name.endswith("_mask"):
                self._users.setdefault(_identity(tensor), []).append(name)

    def judge(self, weight: _Weight, known: CSBMatrix | None) -> tuple[ReportRow, CSBMatrix | None]:
        tensor, mask = weight.tensor, weight.mask
        if reason := self._obstacle(weight):
            return _kept(weight, reason), None
        shape = tuple(tensor.shape[:2])
        flat = tensor.detach().reshape(shape)
        flat_mask = None if mask is None else (mask != 0).reshape(shape)
        elements = flat.numel()
        sparsity = 1 - convert.count_kept(flat, flat_mask) / elements if elements else 0.0
        if reason := self._threshold.too_dense(shape, tensor.element_size(), sparsity):
            return _kept(weight, reason, sparsity), None
        if mask is not None:
            # A mask may hold other numbers than zero and one.
            flat = weight.value().reshape(shape)
        matrix = known or CSBMatrix.from_dense(flat, flat_mask, target=self._options.target)
        before = elements * tensor.element_size()
        if self._threshold.need_smaller and matrix.nbytes >= before:
            return _kept(weight, f"not smaller: {matrix.nbytes} bytes compressed", sparsity), None
        kind = "matrix" if tensor.dim() == 2 else "1x1 kernel"
        return ReportRow(weight.name, kind, shape, sparsity, before, matrix.nbytes, "converted"), matrix

    def _obstacle(self, weight: _Weight) -> str | None:
        tensor, layer = weight.tensor, _split(weight.name)[0]
        if any(fnmatch.fnmatchcase(layer, pattern) for pattern in self._options.exclude):
            return "excluded"
        if tensor.layout != torch.strided or tensor.dtype not in convert.VALUE_DTYPES:
            return f"unsupported weight: {tensor.dtype}, expected float64, float32, bfloat16 or float16"
        if tensor.dim() == 4 and tuple(tensor.shape[2:]) != (1, 1):
            return f"not a 1x1 convolution: its kernel is {tensor.shape[2]}x{tensor.shape[3]}"
        if tensor.dim() not in (2, 4):
            return f"neither a matrix nor a 1x1 kernel: it has {tensor.dim()} dimensions"
        if any(fnmatch.fnmatchcase(layer, pattern) for pattern in self._options.include):
            return None
        users = self._users.get(_identity(tensor), [])
        if len(users) > 1:
            return f"tied weight: stored as {' and '.join(users)} (--include)"
        parent, own = _split(layer)
        if f"{parent}.in_proj_weight".lstrip(".") in self._state:
            return "part of MultiheadAttention: it reads this weight directly"
        if any(fnmatch.fnmatchcase(own, pattern) for pattern in _LOOKED_UP):
            return "an embedding by its name: rows of it are looked up (--include)"
        return None


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
