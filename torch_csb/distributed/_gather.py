"""A sharded model's state as if one process had trained it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_csb.distributed._linear import TensorParallelCSBLinear
from torch_csb.nn._shard import is_sharded


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of ``model`` with whole tensors, on the CPU, for ``torch_csb.save`` or ``load_state_dict``.

    Sharded tensors (of ``fully_shard``, of ``parallelize_module``, or of both) are gathered one after the other, and
    a tensor-parallel CSB layer is put together to one layer. Every rank has to call it.

    Returns:
        All tensors on rank 0, an empty dict on the others. What was whole and on the CPU is the model's own tensor.
    """
    keep = dist.get_rank() == 0
    parts = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TensorParallelCSBLinear)
    }
    layers: dict[int, dict[str, Tensor]] = {}
    seen: dict[int, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, name = key.rpartition(".")
        module = parts.get(owner)
        if module is not None:
            if id(module) not in layers:
                state = module.gather().state_dict()
                layers[id(module)] = {inner: array.cpu() for inner, array in state.items()} if keep else {}
            gathered = layers[id(module)].get(name)
        else:
            if id(tensor) not in seen:  # Tied weights stay one tensor.
                full = tensor.full_tensor() if is_sharded(tensor) else tensor
                seen[id(tensor)] = full.detach().cpu() if keep else full.new_empty(0)
            gathered = seen[id(tensor)]
        if keep:
            whole[key] = gathered
    return whole
