"""Nets and data of small whole numbers. Their sums are exact in float32 in any order, so that splitting a batch, or a
sum, over processes has to give the very bits of one process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_csb import CSBLinear

BATCH, FEATURES, CLASSES = 8, 33, 21


def numbers(*shape: int, seed: int, device: str = "cpu", largest: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float().to(device)


def linear(k: int, m: int, seed: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(k, m, bias=bias)
    layer.weight.data = numbers(m, k, seed=seed)
    if bias:
        layer.bias.data = numbers(m, seed=seed + 100)
    return layer


def sparse(
    k: int, m: int, seed: int, *, sparsity: float = 0.8, bias: bool = True, block_size: int = 16, activation=None
) -> CSBLinear:
    """With an odd number of entries, if with any."""
    dense = linear(k, m, seed, bias=bias)
    mask = torch.rand(m, k, generator=torch.Generator().manual_seed(seed + 200)) >= sparsity
    if mask.any() and mask.sum() % 2 == 0:
        mask[tuple(mask.nonzero()[0])] = False
    return CSBLinear.from_dense(dense, mask, block_size=block_size, activation=activation)


class Net(nn.Module):
    """A sparse layer of odd length in memory (blocks of 8 aren't padded), an empty one, a dense one, a sparse one."""

    def __init__(self, seed: int = 0, empty: bool = True) -> None:
        super().__init__()
        self.up = sparse(FEATURES, 47, seed, block_size=8)
        self.empty = sparse(47, 47, seed + 1, sparsity=1.1 if empty else 0.9)
        self.dense = linear(47, 20, seed + 2)
        self.down = sparse(20, CLASSES, seed + 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(x))
        x = torch.relu(x + self.empty(x))
        return self.down(torch.relu(self.dense(x)))


def batch(device: str) -> tuple[Tensor, Tensor]:
    """Inputs, and what their outputs are multiplied by for a loss."""
    return numbers(BATCH, FEATURES, seed=7, device=device), numbers(BATCH, CLASSES, seed=8, device=device)


def loss(output: Tensor, factor: Tensor) -> Tensor:
    return (output * factor).sum() / len(output)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2**-6, momentum=0.5)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, factor: Tensor, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), factor).backward()
        optimizer.step()


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key].cpu(), tensor.cpu()), f"{key}: {found[key]} instead of {tensor}"
