from __future__ import annotations

from torch import Tensor

from torch_csb.prune.schedule import ScheduledPruner


class GradualMagnitude(ScheduledPruner):
    """Prunes the weights of the smallest ``|w|`` while the model trains, on a schedule.

    Each update ranks all weights anew by the magnitude of ``weight_orig``, pruned ones included: a pruned weight
    keeps its value and returns when others fall below it, until the schedule's last update freezes the masks. From
    then on pruned weights, and their part of the optimizer's state, are zero. With ``CubicSchedule.one_shot`` this is
    one-shot magnitude pruning. Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression" (2018).

    Args:
        schedule, scope, filter_fn, exclude, generator: see :class:`ScheduledPruner`; nothing here is random.
    """

    def _scores(self, name: str) -> Tensor:
        return self._magnitudes(name).masked_fill(~self._allowed[name], -1)
