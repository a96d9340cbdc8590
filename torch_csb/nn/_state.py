"""Loading a CSB layer's state: read() validates untrusted tensors and changes nothing, adopt_*() then cannot fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_csb import convert
from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _groups, _masks
from torch_csb.nn._shard import distributed_like, is_sharded, refuse_sharded

ARRAYS = ("values", "codes", "blk_ptr", "blk_pad", "layout")


@dataclass(frozen=True)
class Expected:
    """The layer that a state is read for."""

    m: int
    k: int
    weight_shape: tuple[int, ...]
    has_bias: bool
    # How and where a dense weight is packed; None leaves it where it is.
    layout: Layout
    device: torch.device | None
    groups: int = 1

    @classmethod
    def of(cls, layer: Any, *, assign: bool = False) -> Expected:
        device = None if assign else layer.values.device
        return cls(
            layer.m,
            layer.k,
            layer._weight_shape(),
            layer.bias is not None,
            layer._layout,
            device,
            getattr(layer, "groups", 1),
        )


@dataclass
class Incoming:
    """A validated state. ``missing`` and ``unexpected`` are names inside the layer."""

    matrix: CSBMatrix | None = None
    bias: Tensor | None = None
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def read(tensors: Mapping[str, Any], expected: Expected, prefix: str = "") -> Incoming:
    """Reads ``tensors`` (names without ``prefix``, which is only for messages).

    Raises:
        ValueError: naming the tensor and what is wrong with it.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{prefix}{name}: expected a tensor, got {type(tensor).__name__}")
    found = Incoming()
    rest = dict(tensors)
    present = [name for name in ARRAYS if name in rest]
    if present:
        if absent := [name for name in ARRAYS if name not in rest]:
            raise ValueError(
                f"{prefix}{present[0]}: came without {', '.join(prefix + name for name in absent)}; "
                "the tensors of a CSB layer have a meaning only together"
            )
        found.matrix = _read_matrix({name: rest.pop(name) for name in ARRAYS}, expected, prefix)
    elif "weight" in rest or "weight_orig" in rest or _masks.keys_of(rest, "weight"):
        found.matrix = _read_dense(rest, expected, prefix)
    else:
        found.missing.extend(ARRAYS)
    if expected.has_bias:
        found.bias = _read_bias(rest, expected, prefix)
        if found.bias is None:
            found.missing.append("bias")
    found.unexpected.extend(rest)
    return found


def _read_matrix(arrays: dict[str, Tensor], expected: Expected, prefix: str) -> CSBMatrix:
    try:
        layout = Layout.from_tensor(arrays.pop("layout"))
    except ValueError as error:
        raise ValueError(f"{prefix}layout: {str(error).removeprefix('layout: ')}") from error
    arrays = {name: _readable(tensor) for name, tensor in arrays.items()}
    try:
        matrix = CSBMatrix.from_arrays(**arrays, m=expected.m, k=expected.k, layout=layout)
        if expected.groups > 1:
            _groups.local_index(matrix, expected.groups)
        return matrix
    except ValueError as error:
        name = next((name for name in arrays if f"{name}:" in str(error)), "values")
        raise ValueError(f"{prefix}{name}: {error} (for a weight of {expected.m} x {expected.k})") from error


def _readable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach() if not isinstance(tensor, nn.Parameter) else tensor
    # Files promise no alignment; kernels read codes 16 bytes at a time.
    if is_sharded(tensor):  # Only its shape and dtype are checked, and it has no pointer to ask for.
        return tensor
    if not tensor.is_contiguous() or (not tensor.is_meta and tensor.data_ptr() % 16):
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor


def _read_dense(rest: dict[str, Tensor], expected: Expected, prefix: str) -> CSBMatrix:
    mask = None
    if "weight" in rest:
        name = "weight"
        weight = rest.pop(name)
    elif "weight_orig" in rest:
        name = "weight_orig"
        weight = rest.pop(name)
        if "weight_mask" not in rest:
            raise ValueError(f"{prefix}weight_orig: came without {prefix}weight_mask")
        mask = rest.pop("weight_mask")
        _check_shape(mask, expected.weight_shape, f"{prefix}weight_mask")
    else:
        name = "parametrizations.weight.original"
        weight, mask = _masks.take(rest, "weight", expected.weight_shape, prefix)
    _check_shape(weight, expected.weight_shape, f"{prefix}{name}")
    if not weight.is_floating_point():
        raise ValueError(f"{prefix}{name}: expected a floating dtype, got {weight.dtype}")
    if weight.dtype not in convert.VALUE_DTYPES:
        weight = weight.float()
    weight = weight.detach().to(expected.device)
    if mask is not None:
        mask = mask.to(weight.device)
        weight = weight * mask.to(weight.dtype)
        mask = (mask != 0).flatten(1)
    if expected.groups > 1:
        return _groups.pack(weight.flatten(1), mask, expected.groups, expected.layout)
    return CSBMatrix(**convert.pack_dense(weight.flatten(1), mask, expected.layout))


def _read_bias(rest: dict[str, Tensor], expected: Expected, prefix: str) -> Tensor | None:
    if "bias_orig" in rest and "bias_mask" in rest and "bias" not in rest:
        for name in ("bias_orig", "bias_mask"):
            _check_shape(rest[name], (expected.m,), f"{prefix}{name}")
        orig = rest.pop("bias_orig").detach()
        return orig * rest.pop("bias_mask").to(orig)
    if "bias" not in rest and _masks.keys_of(rest, "bias"):
        orig, mask = _masks.take(rest, "bias", (expected.m,), prefix)
        _check_shape(orig, (expected.m,), f"{prefix}parametrizations.bias.original")
        return orig.detach() * mask.to(orig)
    bias = rest.pop("bias", None)
    if bias is not None:
        _check_shape(bias, (expected.m,), f"{prefix}bias")
        if not bias.is_floating_point():
            raise ValueError(f"{prefix}bias: expected a floating dtype, got {bias.dtype}")
    return bias


def _check_shape(tensor: Tensor, shape: tuple[int, ...], key: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{key}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def refuse_shards(values: Tensor, tensors: Mapping[str, Any], prefix: str) -> None:
    """A shard of a tensor fits a layer that is sharded alike, but no whole one, and an index array of none."""
    for name, tensor in tensors.items():
        if not is_sharded(values) or name not in ("values", "bias"):
            refuse_sharded(tensor, f"{prefix}{name}")


def refuse_length(values: Tensor, matrix: CSBMatrix | None, prefix: str) -> None:
    """The storage behind a DTensor belongs to who made it: it can't become longer or shorter."""
    if is_sharded(values) and matrix is not None and matrix.values.numel() != values.numel():
        raise ValueError(
            f"{prefix}values: expected {values.numel()} stored entries like the layer, which is sharded, "
            f"got {matrix.values.numel()}; load another pattern before the model is sharded"
        )


@torch.no_grad()
def adopt_matrix(layer: Any, matrix: CSBMatrix, *, assign: bool) -> None:
    """Takes over pattern, layout and values. With ``assign`` the tensors themselves, else copies in the layer's dtype
    and on its device; ``values`` then stays the same Parameter."""
    values = layer._parameters["values"]
    if assign:
        layer._parameters["values"] = _as_parameter(matrix.values, values.requires_grad)
        layer._take_pattern(matrix)
    else:
        arrays = {name: getattr(matrix, name) for name in ("codes", "blk_ptr", "blk_pad", "units")}
        arrays["layout"] = matrix.layout.to_tensor(matrix.device)
        # A gradient belongs to a pattern; of another length, autograd would refuse it anyway.
        if values.grad is not None and not _same_pattern(layer, matrix):
            values.grad = None
        if values.shape == matrix.values.shape:
            values.copy_(distributed_like(matrix.values, values))
        else:
            replace_data(values, matrix.values.detach().to(values.device, values.dtype, copy=True))
        for name, array in arrays.items():
            current = layer._buffers[name]
            if current.shape == array.shape and current.dtype == array.dtype:
                current.copy_(array)
            else:
                layer._buffers[name] = array.to(current.device, copy=True)
        layer._layout, layer.block_size = matrix.layout, matrix.block_size


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a Parameter without a gradient data of another length."""
    # torch keeps what collects a gradient, and with it the old length, while an earlier graph lives; a change of
    # dtype on the way makes it let go.
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data
    # As after copy_, a backward through an earlier forward raises instead of mixing two patterns.
    torch.autograd.graph.increment_version(parameter)


def _same_pattern(layer: Any, matrix: CSBMatrix) -> bool:
    if layer._layout != matrix.layout or layer.values.shape != matrix.values.shape:
        return False
    buffers = layer._buffers
    return all(
        torch.equal(buffers[name], getattr(matrix, name).to(buffers[name].device)) for name in ("blk_ptr", "codes")
    )


@torch.no_grad()
def adopt_bias(layer: Any, bias: Tensor, *, assign: bool) -> None:
    current = layer._parameters["bias"]
    if assign:
        layer._parameters["bias"] = _as_parameter(bias, current.requires_grad)
    else:
        current.copy_(distributed_like(bias, current))


def _as_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor.requires_grad_(requires_grad)
    return nn.Parameter(tensor.detach(), requires_grad=requires_grad)
