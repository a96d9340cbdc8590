from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_csb.matrix import CSBMatrix
from torch_csb.nn import _groups
from torch_csb.nn._deferred import empty_matrix
from torch_csb.nn._layer import CSBLayer
from torch_csb.ops import has_features_last

_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class CSBConv2d(CSBLayer):
    """A 1×1 ``nn.Conv2d`` whose weight W (out_channels × in_channels) is in Compressed Sparse Blocks.

    ``y[n, :, h, w] = act(W x̂[n, :, h·s₀, w·s₁] + b)``, s the stride, x̂ the padded x. With ``groups`` g, W is block
    diagonal: g blocks of (out_channels / g) × (in_channels / g), between which nothing is stored.

    Args:
        matrix: W, float64, float32, bfloat16 or float16, on CPU or CUDA. Its tensors are shared.
        bias: ``[out_channels]`` in the dtype of W, or None.
        stride, padding: one number, or one for height and one for width; around a 1×1 kernel ``"same"`` and ``"valid"``
            add nothing. A padded x is a copy of x.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        groups: a divisor of both numbers of channels.
        activation: None, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"gelu"`` (exact).

    Shapes: ``[N, in_channels, H, W]`` to ``[N, out_channels, ⌈(H + 2p₀)/s₀⌉, ⌈(W + 2p₁)/s₁⌉]``, or the same without N.
    NCHW and channels_last are read where they lie, and the output keeps the input's memory format.

    Raises:
        ValueError: a transposed matrix, another bias shape or dtype, an unknown activation or padding, an entry of W
            between groups, an input that is no image.
    """

    in_channels: int
    out_channels: int

    _dense_type = nn.Conv2d
    _own = CSBLayer._own | {
        "in_channels", "out_channels", "stride", "padding", "dilation", "padding_mode", "groups", "_strided", "_pad"
    }  # fmt: skip

    def __init__(
        self,
        matrix: CSBMatrix,
        bias: Tensor | None = None,
        *,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        padding_mode: str = "zeros",
        groups: int = 1,
        activation: str | None = None,
    ) -> None:
        super().__init__(matrix, bias, activation=activation)
        self.in_channels, self.out_channels = matrix.k, matrix.m
        self.stride = _pair(stride, "stride", 1)
        self._strided = self.stride != (1, 1)
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding: expected numbers, 'same' or 'valid', got {padding!r}")
        self.padding = padding if isinstance(padding, str) else _pair(padding, "padding", 0)
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode: expected one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        self.padding_mode = padding_mode
        rows, cols = (0, 0) if isinstance(self.padding, str) else self.padding
        self._pad = (cols, cols, rows, rows) if rows or cols else None
        if groups < 1 or matrix.m % groups or matrix.k % groups:
            raise ValueError(f"groups: expected a divisor of {matrix.m} and {matrix.k} channels, got {groups}")
        self.groups = groups
        if groups > 1 and not matrix.values.is_meta:
            _groups.local_index(matrix, groups)
        # Changes nothing for a 1x1 kernel; it stands here for to_dense() alone.
        self.dilation = (1, 1)

    @classmethod
    def empty(
        cls,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        padding_mode: str = "zeros",
        groups: int = 1,
        activation: str | None = None,
        block_size: int | None = None,
        target: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> CSBConv2d:
        """A layer whose weight comes later, as :meth:`CSBLinear.empty`."""
        options = {"device": device, "dtype": dtype}
        matrix = empty_matrix(out_channels, in_channels, block_size=block_size, target=target, **options)
        layer = cls(
            matrix,
            torch.zeros(out_channels, **options) if bias else None,
            stride=stride,
            padding=padding,
            padding_mode=padding_mode,
            groups=groups,
            activation=activation,
        )
        layer._mark_unfilled()
        return layer

    @classmethod
    def _like(cls, mod: nn.Conv2d, matrix: CSBMatrix, bias: Tensor | None, activation: str | None) -> CSBConv2d:
        layer = cls(
            matrix,
            bias,
            stride=mod.stride,
            padding=mod.padding,
            padding_mode=mod.padding_mode,
            groups=mod.groups,
            activation=activation,
        )
        layer.dilation = mod.dilation
        return layer

    def _empty_dense(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            1,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.m, self.k // self.groups, 1, 1)

    def _weight_index(self) -> tuple[Tensor, Tensor]:
        return _groups.local_index(self.matrix, self.groups)

    def _dense_weight(self) -> Tensor:
        return super()._dense_weight() if self.groups == 1 else _groups.unpack(self.matrix, self.groups)

    @property
    def sparsity(self) -> float:
        """1 - nnz · groups / (m · k), of the weight inside its groups; 0 for a weight without elements."""
        elements = self.m * self.k // self.groups
        return 1.0 - self.nnz / elements if elements else 0.0

    def _shape_repr(self) -> str:
        more = f", padding={self.padding!r}, padding_mode={self.padding_mode}" if self._pad else ""
        more += f", groups={self.groups}" if self.groups != 1 else ""
        return f"{self.in_channels}, {self.out_channels}, kernel_size=(1, 1), stride={self.stride}{more}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 and x.dim() != 3:
            raise ValueError(
                f"x: expected [N, {self.k}, H, W] or [{self.k}, H, W], got {x.dim()} dimensions: {tuple(x.shape)}"
            )
        features_last = has_features_last(x)
        if self._pad is not None:
            x = F.pad(x, self._pad, _PADDING_MODES[self.padding_mode])
        if self._strided:
            x = x[..., :: self.stride[0], :: self.stride[1]]
        if features_last:
            return self._spmm(x.movedim(-3, -1), -1).movedim(-1, -3)
        return self._spmm(x, -3)


def _pair(numbers: int | tuple[int, int], name: str, least: int) -> tuple[int, int]:
    pair = (numbers, numbers) if isinstance(numbers, int) else tuple(numbers)
    if len(pair) != 2 or min(pair) < least:
        kind = "positive numbers" if least else "numbers from 0 on"
        raise ValueError(f"{name}: expected one or two {kind}, got {numbers!r}")
    return pair
