"""What processes send each other, seen by torch's dispatcher."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Every collective names what it sends; of these, the last argument that is a tensor.
_NAMES = ("broadcast", "reduce_scatter", "allreduce", "all_reduce", "allgather", "all_gather")


class Traffic(TorchDispatchMode):
    """``bytes["allreduce"]`` and so on: bytes of the tensors that were given to collectives of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(function).partition(".")
        if "c10d" in space:
            name = next((known for known in _NAMES if known in name), name)
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            # Of an output and an input, the larger one is what all ranks have together.
            self.bytes[name.replace("_", "")] += max(
                (tensor.numel() * tensor.element_size() for tensor in tensors), default=0
            )
        return function(*args, **(kwargs or {}))
