"""What the tests of transforms share: a net, dense and sparse, and a count of the operators that run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_csb import CSBConv2d, CSBLinear, CSBMatrix

DOUBLE = torch.float64


def pruned(dense: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    dense.weight.data *= 3 * (torch.rand(dense.weight.shape, generator=generator) < 0.3)
    return dense


class Dense(nn.Module):
    """A 1x1 convolution, a layer with a fused activation and one whose activation is never fused, and no bias."""

    def __init__(self, device: str, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.conv = pruned(nn.Conv2d(6, 20, 1))
        self.first = pruned(nn.Linear(20, 33))
        self.second = pruned(nn.Linear(33, 5, bias=False))
        self.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.gelu(self.conv(x)).mean((-2, -1))
        return self.second(torch.relu(self.first(y)))


class Sparse(nn.Module):
    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.conv = CSBConv2d.from_dense(dense.conv, block_size=16, activation="gelu")
        self.first = CSBLinear.from_dense(dense.first, block_size=16, activation="relu")
        self.second = CSBLinear.from_dense(dense.second, block_size=16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x).mean((-2, -1))))


def nets(device: str) -> tuple[Dense, Sparse]:
    dense = Dense(device)
    return dense, Sparse(dense)


def images(device: str, n: int = 4) -> Tensor:
    return torch.randn(n, 6, 3, 2, dtype=DOUBLE, device=device)


def sampled(model: Sparse, dense_grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the dense net, its weights' at the entries alone; any leading dimensions."""
    grads = {}
    for name, value in dense_grads.items():
        layer = getattr(model, name.split(".")[0])
        if name.endswith("weight"):
            mask = layer.matrix.to_dense() != 0
            packed = [CSBMatrix.from_dense(g, mask, block_size=16) for g in value.reshape(-1, layer.m, layer.k)]
            shape = value.shape[: -2 if isinstance(layer, CSBLinear) else -4]
            grads[name.replace("weight", "values")] = torch.stack([p.values for p in packed]).view(*shape, -1)
        else:
            grads[name] = value
    return grads


class Calls(TorchDispatchMode):
    """Counts the operators that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torch_csb":
            self.names.append(func._schema.name.removeprefix("torch_csb::"))
        return func(*args, **(kwargs or {}))
