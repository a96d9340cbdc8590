from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from torch_csb.nn._layer import CSBLayer


def param_groups(model: nn.Module, weight_decay: float, *, no_decay: str | Iterable[str] = ()) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: weights, which decay, and everything else, which doesn't.

    The usual rule, that of timm and many training scripts, is that only Parameters of two and more dimensions decay:
    biases and the scales of norms have one. So have the ``values`` of a CSB layer, which are a weight nevertheless and
    by that rule would silently lose their decay. Here they decay; for a dense model the groups are those of the rule.

        optimizer = torch.optim.AdamW(torch_csb.param_groups(model, weight_decay=0.05), lr=1e-3)

    Args:
        weight_decay: that of the first group; the second has 0.
        no_decay: names (``"embed.weight"``) or patterns (``"*.pos_embed"``) of further Parameters that don't decay.

    Returns:
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``, in the model's
        order; a frozen Parameter is in neither, a shared one is there once.

    Raises:
        ValueError: ``weight_decay`` is negative, or a name in ``no_decay`` is not a Parameter of the model.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay: expected a number from 0 on, got {weight_decay}")
    patterns = [no_decay] if isinstance(no_decay, str) else list(no_decay)
    weights = {id(module._parameters["values"]) for module in model.modules() if isinstance(module, CSBLayer)}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not set(pattern) & set("*?[") and pattern not in names:
            raise ValueError(f"no_decay: the model has no Parameter {pattern!r}")
    spared = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    decaying, rest = [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_weight = (parameter.dim() >= 2 or id(parameter) in weights) and id(parameter) not in spared
        (decaying if is_weight else rest).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
