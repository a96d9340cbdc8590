"""Parameters that fully_shard or parallelize_module made DTensors."""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor | None) -> bool:
    # An isinstance check would import torch.distributed.tensor for everyone.
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def distributed_like(whole: Tensor, current: Tensor) -> Tensor:
    """``whole`` as ``current`` is distributed. Every rank has all of it, so nothing is sent."""
    if not is_sharded(current) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.detach(), current.device_mesh, current.placements, src_data_rank=None)


def refuse_sharded(values: Tensor, name: str) -> None:
    if is_sharded(values):
        raise ValueError(
            f"{name}: expected a whole tensor, got a DTensor of which this rank has {tuple(values.to_local().shape)} "
            f"of {tuple(values.shape)}; torch_csb.distributed.full_state_dict(model) gathers it"
        )
