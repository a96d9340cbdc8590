from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_csb.matrix import CSBMatrix
from torch_csb.nn._deferred import empty_matrix
from torch_csb.nn._layer import CSBLayer


class CSBLinear(CSBLayer):
    """``y = act(x Wᵀ + b)`` with W (out_features × in_features) in Compressed Sparse Blocks: a sparse ``nn.Linear``.

    Args:
        matrix: W, float64, float32, bfloat16 or float16, on CPU or CUDA. Its tensors are shared.
        bias: ``[out_features]`` in the dtype of W, or None.
        activation: None, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"gelu"`` (exact).

    Shapes: ``[*, in_features]`` to ``[*, out_features]``, any strides, contiguous output. Equivalent:
    ``act(F.linear(x, layer.to_dense().weight, layer.bias))``.

    Raises:
        ValueError: a transposed matrix, another bias shape or dtype, an unknown activation.
    """

    in_features: int
    out_features: int

    _dense_type = nn.Linear
    _own = CSBLayer._own | {"in_features", "out_features"}

    def __init__(self, matrix: CSBMatrix, bias: Tensor | None = None, *, activation: str | None = None) -> None:
        super().__init__(matrix, bias, activation=activation)
        self.in_features, self.out_features = matrix.k, matrix.m

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        block_size: int | None = None,
        target: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CSBLinear:
        """A layer whose weight comes later, by ``load_state_dict`` or ``load_into``; until then it raises when it runs.

        For models that are built before their file is read, also on the meta device. The state brings pattern, number
        of entries and layout; ``block_size`` and ``target`` matter only for a dense state, which is packed so.
        """
        options = {"device": device, "dtype": dtype}
        matrix = empty_matrix(out_features, in_features, block_size=block_size, target=target, **options)
        layer = cls(matrix, torch.zeros(out_features, **options) if bias else None, activation=activation)
        layer._mark_unfilled()
        return layer

    @classmethod
    def _like(cls, mod: nn.Linear, matrix: CSBMatrix, bias: Tensor | None, activation: str | None) -> CSBLinear:
        return cls(matrix, bias, activation=activation)

    def _empty_dense(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")

    def _shape_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, x: Tensor) -> Tensor:
        return self._spmm(x, -1)
