"""Sparse variational dropout: each weight learns how much noise it bears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_csb.prune.base import Exclude
from torch_csb.prune.learned import LearnedGate, LearnedPruner, draw

K1, K2, K3 = 0.63576, 1.87320, 1.48695
# Keeps the gradient of log alpha finite at theta = 0.
_EPSILON = 1e-8


def log_alpha(theta: Tensor, log_sigma2: Tensor) -> Tensor:
    """log α = log σ² - log(θ² + 1e-8), elementwise, in float32 or better: noise against signal."""
    dtype = torch.promote_types(theta.dtype, torch.float32)
    return log_sigma2.to(dtype) - (theta.to(dtype).square() + _EPSILON).log()


def kl_divergence(log_alpha: Tensor) -> Tensor:
    """KL(q(w) ‖ log-uniform prior), elementwise, by the approximation of Molchanov et al. (2017)::

        KL(α) = k1 - k1 · sigmoid(k2 + k3 · log α) + 0.5 · log(1 + 1/α),   k1 = 0.63576, k2 = 1.87320, k3 = 1.48695

    It falls to 0 as α grows, so it pushes weights into noise.
    """
    return K1 * torch.sigmoid(-K2 - K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


class VariationalGate(LearnedGate):
    def __init__(
        self, log_sigma2: Tensor, kept: Tensor | None, threshold: float, generator: torch.Generator | None
    ) -> None:
        super().__init__("log_sigma2", log_sigma2, kept, -threshold)
        self.generator = generator

    def trained(self, theta: Tensor) -> Tensor:
        return theta

    def final(self, theta: Tensor) -> Tensor:
        return theta * self.selects(theta)

    def scores(self, theta: Tensor) -> Tensor:
        return -log_alpha(theta, self.log_sigma2)

    def costs(self, theta: Tensor) -> Tensor:
        return kl_divergence(log_alpha(theta, self.log_sigma2))


class VariationalDropout(LearnedPruner):
    """Sparse variational dropout: each weight is a Gaussian N(θ, σ²), pruned once it is little more than noise.

    In training mode a layer's output is drawn by local reparametrisation, with ε ~ N(0, 1) for each output element::

        y = W(θ) x + b + sqrt(W(σ²) x²) · ε          log α = log σ² - log θ²

    (W(·) is the linear map or the convolution with these weights.) In evaluation mode and after :meth:`finish` the
    weight is θ where log α < ``threshold``, else 0. The loss is the mean over a batch + :meth:`penalty`, the penalty
    being ``weight`` · ramp · Σ KL(α) (:func:`kl_divergence`).

    :meth:`cut` moves the threshold to where a sparsity is reached that is asked for.

    Args:
        weight: factor of the KL divergence. The evidence lower bound of N training examples has 1/N; larger is sparser.
        warmup: (begin, end) in steps: the factor is 0 up to ``begin`` and grows linearly to ``weight`` at ``end``.
        threshold: log α from which on a weight is pruned; 3.0 is a dropout rate of 95 %.
        log_sigma2: log σ² of every weight at the start. It must travel to about log θ² + 3: in a short training start
            higher, or give it a learning rate of its own.
        lr: learning rate of log σ²; None takes that of the optimizer's first group.
        filter_fn, exclude, generator: see :class:`Pruner`; the generator draws ε.

    Raises:
        ValueError: an argument out of range.

    D. Molchanov, A. Ashukha, D. Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017;
    T. Gale, E. Elsen, S. Hooker, "The State of Sparsity in Deep Neural Networks", 2019.
    """

    def __init__(
        self,
        weight: float,
        *,
        warmup: tuple[int, int] = (0, 0),
        threshold: float = 3.0,
        log_sigma2: float = -10.0,
        lr: float | None = None,
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        exclude: Exclude = (),
        generator: torch.Generator | None = None,
    ) -> None:
        choice = {"filter_fn": filter_fn, "exclude": exclude, "generator": generator}
        super().__init__(weight, warmup=warmup, lr=lr, **choice)
        self.threshold, self.log_sigma2 = float(threshold), float(log_sigma2)
        self._handles: list[Any] = []

    def _gate(self, theta: nn.Parameter, kept: Tensor | None) -> VariationalGate:
        return VariationalGate(torch.full_like(theta, self.log_sigma2), kept, self.threshold, self.generator)

    def _attach(self) -> None:
        super()._attach()
        # Before the user's own hooks, which are to see the output that the layer gives.
        self._handles = [
            layer.register_forward_hook(_add_noise, prepend=True, with_kwargs=True) for layer in self.layers.values()
        ]

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        super()._detach()


def _add_noise(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
    if not layer.training:
        return output
    gate = layer.parametrizations["weight"][0]
    x2 = (args[0] if args else kwargs["input"]).square()
    sigma2 = gate.log_sigma2.exp() if gate.kept is None else gate.log_sigma2.exp() * gate.kept
    conv = isinstance(layer, nn.Conv2d)
    variance = layer._conv_forward(x2, sigma2, None) if conv else F.linear(x2, sigma2)
    # The gradient of sqrt is infinite at 0, where an input is all zero; below the clamp there is none.
    deviation = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    return output + deviation * draw(torch.randn, output, gate.generator)
