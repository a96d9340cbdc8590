"""Dense training, gradual magnitude pruning, fine-tuning: one loop with a hook per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

BATCH = 64


@dataclass(frozen=True)
class Schedule:
    """Epochs and peak learning rate of the three phases."""

    dense_epochs: int = 12
    prune_epochs: int = 12
    tune_epochs: int = 4
    dense_lr: float = 2e-3
    prune_lr: float = 1e-3
    tune_lr: float = 5e-4
    sparsity: float = 0.9

    @property
    def epochs(self) -> int:
        return self.dense_epochs + self.prune_epochs + self.tune_epochs


@dataclass(frozen=True)
class Data:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def fit(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    lr: float,
    on_epoch: Callable[[str], None],
    on_step: Callable[[float], None] | None = None,
) -> torch.optim.Optimizer:
    """Train with AdamW and a cosine learning rate; `on_step` gets the share of the steps done, before each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    steps_per_epoch = len(data.train_y) // BATCH
    total = epochs * steps_per_epoch
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data.train_y)).to(data.train_x.device)
        for step in range(steps_per_epoch):
            if on_step is not None:
                on_step((epoch * steps_per_epoch + step) / total)
            picked = order[step * BATCH : (step + 1) * BATCH]
            loss = F.cross_entropy(model(data.train_x[picked]), data.train_y[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
        on_epoch(f"loss {loss.item():.3f}")
    return optimizer


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of the held-out images that are classified right."""
    model.eval()
    return 100 * (model(data.test_x).argmax(1) == data.test_y).double().mean().item()


class GradualPruning:
    """Per-layer magnitude pruning on the cubic schedule of Zhu & Gupta, "To prune, or not to prune" (2018).

    After a share t of the ramp, the sparsity is s(t) = s_final (1 - (1 - t)^3): fast while weights are plentiful, slow
    at the end. The ramp takes the first three quarters of the phase; the rest trains at the final sparsity. The masks
    are torch.nn.utils.prune's and are chosen anew from the unmasked weight every few steps.
    """

    RAMP = 0.75
    STEPS_BETWEEN_MASKS = 8

    def __init__(self, layers: list[nn.Module], sparsity: float) -> None:
        self.layers = layers
        self.sparsity = sparsity
        self.steps = 0
        for layer in layers:
            prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight))

    def __call__(self, progress: float) -> None:
        if self.steps % self.STEPS_BETWEEN_MASKS == 0:
            self.set_sparsity(self.sparsity * (1 - (1 - min(1.0, progress / self.RAMP)) ** 3))
        self.steps += 1

    @torch.no_grad()
    def set_sparsity(self, sparsity: float) -> None:
        for layer in self.layers:
            magnitude = layer.weight_orig.abs().flatten()
            removed = magnitude.argsort(stable=True)[: round(sparsity * magnitude.numel())]
            layer.weight_mask.fill_(1).view(-1)[removed] = 0


def copy_masked(model: nn.Module, fresh: nn.Module, pruned_layers: tuple[str, ...]) -> nn.Module:
    """Give `fresh` the weights and masks of `model` (deepcopy refuses the derived weight that prune's hooks leave)."""
    GradualPruning([fresh.get_submodule(name) for name in pruned_layers], 0.0)
    fresh.load_state_dict(model.state_dict())
    return fresh


def remove_masks(model: nn.Module, pruned_layers: tuple[str, ...]) -> nn.Module:
    """Multiply the masks in for good, in place: dense kernels on a weight full of zeros, no mask left to apply."""
    for name in pruned_layers:
        prune.remove(model.get_submodule(name), "weight")
    return model
