"""What a dense nn.Linear or nn.Conv2d holds, and how its surroundings move to its replacement."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_csb import convert
from torch_csb.nn import _masks

_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
DENSE_ATTRIBUTES = {
    nn.Linear: frozenset(vars(nn.Linear(1, 1, device="meta"))),
    nn.Conv2d: frozenset(vars(nn.Conv2d(1, 1, 1, device="meta"))),
}


class DenseWeight(NamedTuple):
    matrix: Tensor  # [m, k], a detached view
    mask: Tensor | None  # bool [m, k]
    parameter: nn.Parameter


def obstacle(mod: nn.Module, *, meta: bool = False) -> str | None:
    """Why ``mod`` can't become a CSB layer, as ``"kind of reason: detail"``, or None. Reads no data.

    With ``meta`` the weight may be on the meta device, for its data comes from elsewhere.
    """
    if reason := _masks.obstacle(mod):
        return reason
    kind = _masks.layer_type(mod)
    if not issubclass(kind, tuple(DENSE_ATTRIBUTES)):
        return f"unsupported layer: there is no CSB form of {kind.__name__}"
    if kind not in DENSE_ATTRIBUTES:
        return f"not a plain layer: it is a {kind.__name__}, which may read its weight directly"
    if isinstance(mod, nn.Conv2d) and (reason := _conv_obstacle(mod)):
        return reason
    if "forward" in vars(mod):
        return "not a plain layer: its forward was replaced"
    if inner := [name for name in mod._modules if name != "parametrizations"]:
        return f"not a plain layer: it has the submodule {inner[0]!r}"
    if any(getattr(mod, name) for name in _STATE_HOOKS):
        return "not a plain layer: its state_dict hooks know a dense weight"
    known = {"weight", "bias"}
    known |= {f"{name}_{part}" for name in ("weight", "bias") if is_pruned(mod, name) for part in ("orig", "mask")}
    if extra := [name for name in (*mod._parameters, *mod._buffers) if name not in known]:
        return f"not a plain layer: it holds the tensor {extra[0]!r}"
    weight = weight_parameter(mod)
    if reason := _weight_obstacle(weight, ("cpu", "cuda", "meta") if meta else ("cpu", "cuda")):
        return reason
    bias = bias_parameter(mod)
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return (
            f"unsupported bias: {bias.dtype} on {bias.device}, expected the weight's {weight.dtype} on {weight.device}"
        )
    return None


def _conv_obstacle(mod: nn.Conv2d) -> str | None:
    if tuple(mod.kernel_size) != (1, 1):
        return f"not a 1x1 convolution: kernel_size is {tuple(mod.kernel_size)}"
    return None


def _weight_obstacle(weight: nn.Parameter | None, devices: Collection[str]) -> str | None:
    if weight is None:
        return "parametrized: its weight is not a Parameter of its own"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"unsupported weight: it is a {type(weight.data).__name__}, expected a plain tensor"
    if weight.layout != torch.strided:
        return f"unsupported weight: its layout is {weight.layout}, expected torch.strided"
    if weight.dtype not in convert.VALUE_DTYPES:
        return f"unsupported weight: its dtype is {weight.dtype}, expected float64, float32, bfloat16 or float16"
    if weight.device.type not in devices:
        return f"unsupported weight: it is on {weight.device}, expected cpu or cuda"
    return None


def is_pruned(mod: nn.Module, name: str) -> bool:
    """Does nn.utils.prune compute ``mod.<name>``?"""
    return any(_is_pruning_hook(hook, (name,)) for hook in mod._forward_pre_hooks.values())


def _is_pruning_hook(hook: object, names: Collection[str]) -> bool:
    return isinstance(hook, prune.BasePruningMethod) and hook._tensor_name in names


def weight_parameter(mod: nn.Module) -> nn.Parameter | None:
    """The trained tensor behind ``mod.weight``."""
    return _parameter(mod, "weight")


def bias_parameter(mod: nn.Module) -> nn.Parameter | None:
    """The trained tensor behind ``mod.bias``."""
    return _parameter(mod, "bias")


def _parameter(mod: nn.Module, name: str) -> nn.Parameter | None:
    if _masks.is_parametrized(mod, name):
        return _masks.original(mod, name)
    return mod._parameters.get(f"{name}_orig" if is_pruned(mod, name) else name)


def read_weight(mod: nn.Module, mask: Tensor | None = None) -> DenseWeight:
    """The weight of a layer without an :func:`obstacle`; a pruning mask and ``mask`` are combined.

    Raises:
        ValueError: a mask has another shape, or holds more than zeros and ones; a parametrization is no mask.
    """
    parameter = weight_parameter(mod)
    shape = parameter.shape
    if mask is not None:
        if mask.shape not in (shape, shape[:2]):
            raise ValueError(f"mask: expected shape {tuple(shape)}, got {tuple(mask.shape)}")
        mask = (mask != 0).to(parameter.device).view(shape)
    if is_pruned(mod, "weight"):
        pruning = mod._buffers["weight_mask"]
        # A product orig * mask would cost another dense weight; zeros and ones make it needless.
        if not _is_binary(pruning):
            raise ValueError("pruning mask: expected zeros and ones, got other values")
        kept = pruning != 0
        mask = kept if mask is None else kept.logical_and_(mask)
    elif _masks.is_parametrized(mod, "weight"):
        kept = _masks.read(mod, "weight")
        mask = kept if mask is None else kept.logical_and_(mask)
    if _masks.is_parametrized(mod, "bias"):
        _masks.read(mod, "bias")  # Raises here, before anything has changed.
    matrix = parameter.detach()
    if matrix.dim() == 4:
        matrix = matrix[:, :, 0, 0]
        mask = None if mask is None else mask[:, :, 0, 0]
    return DenseWeight(matrix, mask, parameter)


def _is_binary(mask: Tensor) -> bool:
    if mask.dtype == torch.bool or mask.numel() == 0:
        return True
    low, high = mask.aminmax()
    own = mask.dtype in convert.VALUE_DTYPES
    nonzero = convert.count_kept(mask.flatten(1), None) if own else torch.count_nonzero(mask)
    return bool((low >= 0) & (high <= 1) & (mask.sum(dtype=torch.float64) == nonzero))


def read_bias(mod: nn.Module, *, move: bool) -> nn.Parameter | None:
    """The effective bias: the layer's very Parameter with ``move``, else a copy.

    Raises:
        ValueError: a parametrization of the bias is no mask.
    """
    bias, mask = bias_parameter(mod), None
    if bias is None:
        return None
    if is_pruned(mod, "bias"):
        mask = mod._buffers["bias_mask"].to(bias.dtype)
    elif _masks.is_parametrized(mod, "bias"):
        mask = _masks.read(mod, "bias").to(bias.dtype)
    effective = bias.detach() if mask is None else bias.detach() * mask
    if not move:
        return nn.Parameter(effective.clone(), requires_grad=bias.requires_grad)
    if mask is not None:
        bias.data = effective
    return bias


def carry_over(source: nn.Module, target: nn.Module, own: Collection[str], *, move: bool) -> None:
    """Gives ``target`` the mode, the hooks (with their ids) and the user's attributes of ``source``.

    ``own`` names the attributes that belong to the type of ``source``. With ``move`` both share the hook
    dictionaries, so that handles given out earlier still remove their hook; ``source`` is then to be dropped.
    """
    target.training = source.training
    target._is_full_backward_hook = source._is_full_backward_hook
    for name in _HOOKS:
        hooks = getattr(source, name)
        setattr(target, name, hooks if move else hooks.copy())
    pruning = [i for i, hook in target._forward_pre_hooks.items() if _is_pruning_hook(hook, ("weight", "bias"))]
    for i in pruning:
        del target._forward_pre_hooks[i]
    standard = _MODULE_ATTRIBUTES.union(own, vars(target), ("weight", "bias"))
    for name, value in vars(source).items():
        if name not in standard:
            vars(target)[name] = value
