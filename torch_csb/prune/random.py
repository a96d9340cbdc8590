from __future__ import annotations

import torch
from torch import Tensor

from torch_csb.prune.base import weight_of
from torch_csb.prune.schedule import ScheduledPruner


class GradualRandom(ScheduledPruner):
    """Prunes weights at random, on a schedule: the control that any method has to beat.

    Each weight draws its rank once, from U(0, 1), in :meth:`prepare`; so the masks are nested (what is pruned stays
    pruned) and depend on the generator's seed and the layers alone. Gale, Elsen and Hooker, "The State of Sparsity in
    Deep Neural Networks" (2019).

    Args:
        schedule, scope, filter_fn, exclude, generator: see :class:`ScheduledPruner`. In distributed training every
            process needs a generator of the same seed.
    """

    def _start(self) -> None:
        device = None if self.generator is None else self.generator.device
        self._ranks = {
            name: torch.rand(weight_of(layer).shape, generator=self.generator, device=device)
            .to(weight_of(layer).device)
            .masked_fill(~self._allowed[name], -1)
            for name, layer in self.layers.items()
        }

    def _scores(self, name: str) -> Tensor:
        return self._ranks[name]
