from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Their steps look at a parameter as a matrix, or at all parameters as one vector, whatever their state holds so far.
_NOT_ELEMENTWISE = tuple(getattr(torch.optim, name) for name in ("LBFGS", "Muon") if hasattr(torch.optim, name))


def check_optimizer(optimizer: object) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, _NOT_ELEMENTWISE):
        raise ValueError(
            f"optimizer: expected one that works element by element, as Adam, AdamW and SGD, "
            f"got {type(optimizer).__name__}; make a new one from model.parameters()"
        )


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def moved(
    state: dict[str, Any], shape: torch.Size, move: Callable[[Tensor], Tensor], name: str, optimizer: object
) -> dict[str, Any]:
    """A parameter's state with its moments, the tensors of the parameter's ``shape``, moved; a step count stays.

    Raises:
        ValueError: a tensor has neither the shape of the parameter nor one element, so what it means is not known.
    """
    result = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            if value.shape == shape:
                value = move(value)
            elif value.numel() != 1:
                raise ValueError(
                    f"optimizer: the state {key!r} of {name} in {type(optimizer).__name__} has shape "
                    f"{tuple(value.shape)}, expected {tuple(shape)} or one element; make a new optimizer"
                )
        elif isinstance(value, (list, tuple, dict)):
            raise ValueError(
                f"optimizer: the state {key!r} of {name} in {type(optimizer).__name__} is a {type(value).__name__}, "
                "expected tensors and numbers; make a new optimizer"
            )
        result[key] = value
    return result
