"""L0 regularisation: a hard concrete gate on each weight, and the expected number of open gates as a penalty."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_csb.prune.base import Exclude
from torch_csb.prune.learned import LearnedGate, LearnedPruner, draw

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sampled_gate(log_alpha: Tensor, u: Tensor, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """The gate z in [0, 1] that uniform numbers u in [0, 1) make, elementwise::

    s = sigmoid((log u - log(1 - u) + log α) / β),   z = min(1, max(0, s · (ζ - γ) + γ))
    """
    s = torch.sigmoid((torch.logit(u) + log_alpha) / beta)
    return (s * (zeta - gamma) + gamma).clamp(0, 1)


def final_gate(log_alpha: Tensor, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """The gate after training, elementwise: ``min(1, max(0, sigmoid(log α) · (ζ - γ) + γ))``."""
    return (torch.sigmoid(log_alpha) * (zeta - gamma) + gamma).clamp(0, 1)


def open_probability(log_alpha: Tensor, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """P(z ≠ 0) = sigmoid(log α - β · log(-γ/ζ)), elementwise; its sum is the expected L0 norm."""
    return torch.sigmoid(log_alpha - beta * math.log(-gamma / zeta))


class HardConcreteGate(LearnedGate):
    def __init__(
        self,
        log_alpha: Tensor,
        kept: Tensor | None,
        shape: tuple[float, float, float],
        generator: torch.Generator | None,
    ) -> None:
        self.beta, self.gamma, self.zeta = shape
        # Here the final gate becomes 0.
        self.least_cutoff = math.log(-self.gamma) - math.log(self.zeta)
        super().__init__("log_alpha", log_alpha, kept, self.least_cutoff)
        self.generator = generator

    def trained(self, theta: Tensor) -> Tensor:
        # In float32 or better: a coarse u near 0 or 1 would open and close too many gates.
        u = draw(torch.rand, self._precise(), self.generator)
        return theta * sampled_gate(self._precise(), u, self.beta, self.gamma, self.zeta).to(theta.dtype)

    def final(self, theta: Tensor) -> Tensor:
        return theta * (final_gate(self._precise(), self.gamma, self.zeta) * self.selects(theta)).to(theta.dtype)

    def scores(self, theta: Tensor) -> Tensor:
        return self._precise()

    def costs(self, theta: Tensor) -> Tensor:
        return open_probability(self._precise(), self.beta, self.gamma, self.zeta)

    def _precise(self) -> Tensor:
        return self.log_alpha.to(torch.promote_types(self.log_alpha.dtype, torch.float32))


class L0(LearnedPruner):
    """L0 regularisation: each weight is θ · z, with a random gate z that is exactly 0 with some probability.

    z has the hard concrete distribution with a trained log α for each weight (:func:`sampled_gate`); each forward in
    training mode draws all gates anew. In evaluation mode the gate is the deterministic :func:`final_gate`; at
    :meth:`finish` it is multiplied in, and weights with a gate of 0 are pruned. The loss is the mean over a batch +
    :meth:`penalty`, the penalty being ``weight`` · ramp · Σ P(z ≠ 0) (:func:`open_probability`).

    :meth:`cut` moves the threshold to where a sparsity is reached that is asked for.

    Args:
        weight: factor of the expected L0 norm, what one open gate costs; larger is sparser.
        warmup: (begin, end) in steps: the factor is 0 up to ``begin`` and grows linearly to ``weight`` at ``end``.
        dropout_rate: ρ in (0, 1), the first log α being log(1 - ρ) - log ρ. Small for a trained network: at 0.1 its
            gates start almost open.
        beta, gamma, zeta: temperature and stretch of the distribution, β > 0, γ < 0, ζ > 1.
        lr: learning rate of log α; None takes that of the optimizer's first group. A weight is pruned where log α is
            below log(-γ) - log ζ (-2.4 by default), so a short training needs a larger one.
        filter_fn, exclude, generator: see :class:`Pruner`; the generator draws the gates.

    Raises:
        ValueError: an argument out of range.

    C. Louizos, M. Welling, D. P. Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018;
    T. Gale, E. Elsen, S. Hooker, "The State of Sparsity in Deep Neural Networks", 2019.
    """

    def __init__(
        self,
        weight: float,
        *,
        warmup: tuple[int, int] = (0, 0),
        dropout_rate: float = 0.1,
        beta: float = BETA,
        gamma: float = GAMMA,
        zeta: float = ZETA,
        lr: float | None = None,
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        exclude: Exclude = (),
        generator: torch.Generator | None = None,
    ) -> None:
        choice = {"filter_fn": filter_fn, "exclude": exclude, "generator": generator}
        super().__init__(weight, warmup=warmup, lr=lr, **choice)
        if not 0 < dropout_rate < 1:
            raise ValueError(f"dropout_rate: expected a number between 0 and 1, got {dropout_rate!r}")
        if not beta > 0:
            raise ValueError(f"beta: expected a number above 0, got {beta!r}")
        if not (gamma < 0 and zeta > 1):
            raise ValueError(f"gamma, zeta: expected gamma < 0 and zeta > 1, got {gamma!r} and {zeta!r}")
        self.dropout_rate, self.beta, self.gamma, self.zeta = dropout_rate, beta, gamma, zeta

    def _gate(self, theta: nn.Parameter, kept: Tensor | None) -> HardConcreteGate:
        start = math.log(1 - self.dropout_rate) - math.log(self.dropout_rate)
        shape = (self.beta, self.gamma, self.zeta)
        return HardConcreteGate(torch.full_like(theta, start), kept, shape, self.generator)
