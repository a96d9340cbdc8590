from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from torch_csb.prune.schedule import CubicSchedule, ScheduledPruner

EDGES = (8, 16, 32)
CHANNELS = (1, 2, 4)


class BlockMagnitude(ScheduledPruner):
    """Prunes whole blocks of the weight matrix, those of the smallest sum of ``|w|``, on a schedule.

    The weight of an ``nn.Conv2d`` is seen as a matrix of shape [output channels, the rest]. Sparsity counts blocks. A
    block cut off at the matrix's edge is ranked as if its mean ``|w|`` went on beyond it. Gray, Radford and Kingma,
    "GPU Kernels for Block-Sparse Weights" (2017); Elsen et al., "Fast Sparse ConvNets" (2019).

    Args:
        block_shape: 8, 16 or 32 for square blocks, or (channels, 1) with 1, 2 or 4 for groups of neighbouring output
            channels that share each input's mask.
        schedule, scope, filter_fn, exclude, generator: see :class:`ScheduledPruner`; nothing here is random.

    Raises:
        ValueError: another ``block_shape``.
    """

    def __init__(
        self,
        schedule: CubicSchedule,
        block_shape: int | tuple[int, int] = 8,
        scope: str | Mapping[str, float] = "uniform",
        **which_layers: object,
    ) -> None:
        super().__init__(schedule, scope, **which_layers)
        shape = (block_shape, block_shape) if isinstance(block_shape, int) else tuple(block_shape)
        if shape not in [*((edge, edge) for edge in EDGES), *((channels, 1) for channels in CHANNELS)]:
            raise ValueError(
                f"block_shape: expected 8, 16, 32 or (channels, 1) with 1, 2 or 4 channels, got {block_shape!r}"
            )
        self.block_shape = shape

    def _scores(self, name: str) -> Tensor:
        allowed = self._allowed[name].flatten(1)
        magnitudes = self._magnitudes(name).flatten(1) * allowed
        # Half precision would round the sums of whole blocks into ties.
        sums = self._sums(magnitudes.float() if magnitudes.element_size() < 4 else magnitudes)
        sizes = self._sums(magnitudes.new_ones(magnitudes.shape, dtype=sums.dtype))
        whole = self.block_shape[0] * self.block_shape[1]
        return (sums * (whole / sizes)).masked_fill(self._sums(allowed.to(sums.dtype)) == 0, -1)

    def _sums(self, matrix: Tensor) -> Tensor:
        (m, k), (rows, columns) = matrix.shape, self.block_shape
        padded = F.pad(matrix, (0, -k % columns, 0, -m % rows))
        return padded.view(-(-m // rows), rows, -(-k // columns), columns).sum((1, 3))

    def _expand(self, name: str, units: Tensor) -> Tensor:
        rows, columns = self.block_shape
        shape = self._allowed[name].shape
        mask = units.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return mask[: shape[0], : shape[1:].numel()].reshape(shape)
