from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from torch_csb.nn import _dense
from torch_csb.prune.base import install_mask, zero_outside


def scratch_control(
    model: nn.Module, masks: Mapping[str, Tensor], generator: torch.Generator | None = None
) -> nn.Module:
    """The control for what training before pruning was worth: the same masks on freshly initialised weights.

    Returns a copy of ``model`` in which every module was initialised anew by its ``reset_parameters()``, with ``masks``
    held by ``torch.nn.utils.prune`` and exact zeros outside them; other pruning masks are gone. ``model`` is left as it
    is, and torch's default random state too where a generator is given. Gale, Elsen and Hooker, "The State of Sparsity
    in Deep Neural Networks" (2019).

    Args:
        masks: what :meth:`Pruner.finish` returned.

    Raises:
        ValueError: a name in ``masks`` that the model doesn't have, a mask of another shape, or a module with
            parameters of its own but no ``reset_parameters()``.
    """
    control = copy.deepcopy(model, detached_weights(model))
    modules = dict(control.named_modules())
    if unknown := [name for name in masks if name not in modules]:
        raise ValueError(f"masks: expected names of the model's layers, got {unknown[0]!r}")
    for name, module in modules.items():
        for tensor in ("weight", "bias"):
            if _dense.is_pruned(module, tensor):
                prune.remove(module, tensor)
        own = any(parameter is not None for parameter in module._parameters.values())
        if own and not callable(getattr(module, "reset_parameters", None)):
            kind = type(module).__name__
            raise ValueError(f"model: expected modules with reset_parameters(), got a {kind} without, {name!r}")
    _initialise(control, generator)
    for name, mask in masks.items():
        zero_outside(modules[name], mask)
        install_mask(modules[name], mask)
    return control


def detached_weights(model: nn.Module) -> dict[int, Tensor]:
    """A memo for deepcopy, which refuses the results of a forward that nn.utils.prune leaves in its modules."""
    found = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return {id(value): value.detach().clone() for value in found if value.grad_fn is not None}


def _initialise(model: nn.Module, generator: torch.Generator | None) -> None:
    resets = [module.reset_parameters for module in model.modules() if hasattr(module, "reset_parameters")]
    if generator is None:
        for reset in resets:
            reset()
        return
    # reset_parameters takes no generator: it reads torch's default one, lent here and then given back.
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        for reset in resets:
            reset()
