from __future__ import annotations

from torch_csb import convert
from torch_csb._winner import dense_wins

AUTO_MIN_SPARSITY = 0.5


class Threshold:
    """How sparse a weight must be to be compressed; the arguments are those of :func:`torch_csb.sparsify_`."""

    def __init__(self, min_sparsity: float | str, batch: int | None, target: str) -> None:
        if min_sparsity != "auto" and not (isinstance(min_sparsity, (int, float)) and 0 <= min_sparsity <= 1):
            raise ValueError(f"min_sparsity: expected 'auto' or a number from 0 to 1, got {min_sparsity!r}")
        if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
            raise ValueError(f"batch: expected a number of columns, at least 1, or None, got {batch!r}")
        self.need_smaller = min_sparsity == "auto"
        self._min_sparsity = AUTO_MIN_SPARSITY if min_sparsity == "auto" else float(min_sparsity)
        self._batch = batch
        self._cuda = convert.is_cuda(target)

    def too_dense(self, shape: tuple[int, ...], item_bytes: int, sparsity: float) -> str | None:
        """Of a weight [out features, in features]: why it is, if it is."""
        if sparsity < self._min_sparsity:
            return f"too dense: {100 * sparsity:.1f} % zeros, {100 * self._min_sparsity:g} % are asked for"
        if self._batch and dense_wins("spmm", self._cuda, item_bytes, *shape[:2], self._batch, sparsity):
            where = "a GPU" if self._cuda else "a CPU"
            return f"faster dense: {100 * sparsity:.1f} % zeros, {self._batch} columns, on {where}"
        return None
