"""scikit-learn's digits and a small convolutional net with its weight in 1x1 convolutions and one wide Linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEST_SHARE = 0.25


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (train images, train labels, test images, test labels); images are [N, 1, 8, 8] float32 in [0, 1].

    1797 handwritten digits; a quarter, stratified by digit and the same for every seed, is held out for testing.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise SystemExit(
            "The demo reads scikit-learn's digits, and scikit-learn is not installed here: "
            "run `make demo`, which installs it, or `pip install scikit-learn`."
        ) from error
    digits = sklearn_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images, digits.target, test_size=TEST_SHARE, stratify=digits.target, random_state=0
    )

    def images(array) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32).div(16).unsqueeze(1)

    return images(train_x), torch.as_tensor(train_y), images(test_x), torch.as_tensor(test_y)


class Separable(nn.Module):
    """Depthwise 3x3, then a pointwise 1x1 convolution: the pointwise one holds nearly all of the weight."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.norm = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pointwise(F.relu(self.norm(self.depthwise(x)))))


class DigitsNet(nn.Module):
    """8x8 image -> 64 channels of 4x4 -> 256 channels -> 1024 features -> 512 -> 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 64, 3, padding=1)
        self.widen = Separable(64, 256)
        self.mix = Separable(256, 256)
        self.hidden = nn.Linear(1024, 512)
        self.classifier = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = self.widen(x)
        x = F.max_pool2d(x + self.mix(x), 2)
        return self.classifier(F.relu(self.hidden(x.flatten(1))))


# The stem, the depthwise filters and the classifier, together 2 % of the weights, stay dense.
PRUNED_LAYERS = ("widen.pointwise", "mix.pointwise", "hidden")
