"""Accuracy on scikit-learn's digits: the data, a small net, and one training loop that every pruning method shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_csb.prune import Pruner
from torch_csb.prune.learned import LearnedPruner

BATCH = 64
# Of a training with pruners: the masks are found in this part of it and final afterwards.
RAMP = 0.75


class Data(NamedTuple):
    """1797 images [N, 1, 8, 8], float32 in [0, 1], and their labels: 60 % train, 15 % choose a mask, 25 % test."""

    train_x: Tensor
    train_y: Tensor
    choice_x: Tensor
    choice_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(device: str) -> Data:
    """The same parts for every seed, each with all digits in proportion.

    Raises:
        ValueError: scikit-learn, which brings the images, isn't installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError("scikit-learn, which brings the digits, isn't installed: pip install scikit-learn") from error
    digits = load_digits()
    x, test_x, y, test_y = train_test_split(
        digits.images, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    train_x, choice_x, train_y, choice_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    parts = []
    for images, labels in ((train_x, train_y), (choice_x, choice_y), (test_x, test_y)):
        parts.append(torch.as_tensor(images, dtype=torch.float32, device=device).div(16).unsqueeze(1))
        parts.append(torch.as_tensor(labels, device=device))
    return Data(*parts)


class DigitsNet(nn.Module):
    """8x8 image -> 32 channels of 4x4 -> 128 -> 128 channels -> 512 features -> 256 -> 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.widen = nn.Conv2d(32, 128, 1)
        self.mix = nn.Conv2d(128, 128, 1)
        self.hidden = nn.Linear(512, 256)
        self.classifier = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.widen(x))
        x = F.max_pool2d(F.relu(self.mix(x)), 2)
        return self.classifier(F.relu(self.hidden(x.flatten(1))))


# The stem and the classifier, together 2 % of the weights, stay dense.
KEPT_DENSE = ("stem", "classifier")


def steps_of(epochs: int, data: Data) -> int:
    return epochs * (len(data.train_y) // BATCH)


def ramp_end(epochs: int, data: Data) -> int:
    """The step after which the masks are final."""
    return max(1, int(RAMP * steps_of(epochs, data)))


def fit(
    model: nn.Module,
    data: Data,
    epochs: int,
    lr: float,
    seed: int,
    pruners: Sequence[Pruner] = (),
    sparsity: float | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Trains with AdamW; the seed gives the order of the batches.

    The learning rate is constant over the ramp, so that what is pruned late can heal, and then falls as a cosine.

    Args:
        pruners: their masks are final after the ramp, and are returned.
        sparsity: to which methods that learn their masks, and so have no schedule, are cut at the end of the ramp.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    running = [pruner.prepare(model, optimizer) for pruner in pruners]
    end, left = ramp_end(epochs, data), max(1, steps_of(epochs, data) - ramp_end(epochs, data))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * max(0, step - end) / left)
    )
    masks: dict[str, Tensor] = {}
    model.train()
    for step, (x, y) in enumerate(_batches(data, epochs, seed), start=1):
        loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
        for pruner in running:
            loss = loss + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        after_step()
        for pruner in running:
            pruner.step()
        if running and step == end:
            for pruner in running:
                if sparsity is not None and isinstance(pruner, LearnedPruner):
                    pruner.cut(sparsity)
                masks |= pruner.finish()
            running = []
    return masks


def _batches(data: Data, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_y), generator=generator).to(data.train_y.device)
        for picked in order.split(BATCH)[: steps_of(1, data)]:
            yield data.train_x[picked], data.train_y[picked]


def overall_sparsity(masks: dict[str, Tensor]) -> float:
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent classified right, in evaluation mode."""
    mode = model.training
    model.eval()
    right = 100 * (model(x).argmax(1) == y).double().mean().item()
    model.train(mode)
    return right
