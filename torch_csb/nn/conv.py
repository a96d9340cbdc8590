from __future__ import annotations

from torch import Tensor, nn

from torch_csb.matrix import CSBMatrix
from torch_csb.nn._layer import CSBLayer
from torch_csb.ops import has_features_last


class CSBConv2d(CSBLayer):
    """A 1×1 ``nn.Conv2d`` whose weight W (out_channels × in_channels) is in Compressed Sparse Blocks.

    ``y[n, :, h, w] = act(W x[n, :, h·s₀, w·s₁] + b)``, s the stride.

    Args:
        matrix: W, float64, float32, bfloat16 or float16, on CPU or CUDA. Its tensors are shared.
        bias: ``[out_channels]`` in the dtype of W, or None.
        stride: one number, or one for height and one for width.
        activation: None, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"gelu"`` (exact).

    Shapes: ``[N, in_channels, H, W]`` to ``[N, out_channels, ⌈H/s₀⌉, ⌈W/s₁⌉]``, or the same without N. NCHW and
    channels_last are read where they lie, and the output keeps the input's memory format.

    Raises:
        ValueError: a transposed matrix, another bias shape or dtype, an unknown activation, an input that is no image.
    """

    in_channels: int
    out_channels: int

    _dense_type = nn.Conv2d
    _own = CSBLayer._own | {"in_channels", "out_channels", "stride", "padding", "dilation", "padding_mode", "_strided"}

    def __init__(
        self,
        matrix: CSBMatrix,
        bias: Tensor | None = None,
        *,
        stride: int | tuple[int, int] = 1,
        activation: str | None = None,
    ) -> None:
        super().__init__(matrix, bias, activation=activation)
        self.in_channels, self.out_channels = matrix.k, matrix.m
        self.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
        if len(self.stride) != 2 or min(self.stride) < 1:
            raise ValueError(f"stride: expected one or two positive numbers, got {stride!r}")
        self._strided = self.stride != (1, 1)
        # These change nothing for a 1x1 kernel; they stand here for to_dense() alone.
        self.padding: str | tuple[int, int] = (0, 0)
        self.dilation = (1, 1)
        self.padding_mode = "zeros"

    @classmethod
    def _like(cls, mod: nn.Conv2d, matrix: CSBMatrix, bias: Tensor | None, activation: str | None) -> CSBConv2d:
        layer = cls(matrix, bias, stride=mod.stride, activation=activation)
        layer.padding, layer.dilation, layer.padding_mode = mod.padding, mod.dilation, mod.padding_mode
        return layer

    def _empty_dense(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            1,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.m, self.k, 1, 1)

    def _shape_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size=(1, 1), stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 and x.dim() != 3:
            raise ValueError(
                f"x: expected [N, {self.k}, H, W] or [{self.k}, H, W], got {x.dim()} dimensions: {tuple(x.shape)}"
            )
        features_last = has_features_last(x)
        if self._strided:
            x = x[..., :: self.stride[0], :: self.stride[1]]
        if features_last:
            return self._spmm(x.movedim(-3, -1), -1).movedim(-1, -3)
        return self._spmm(x, -3)
