"""The operators over a CSBMatrix. Every one is differentiable in its floating-point tensors.

| operator            | product                | gradients                                          |
|---------------------|------------------------|----------------------------------------------------|
| ``spmm(W, X)``      | Y = W.X                | dX = spmm_t(W, dY), dW = sddmm(W, dY, X)           |
| ``spmm_t(W, X)``    | Y = W^T.X              | dX = spmm(W, dY), dW = sddmm(W, X, dY)             |
| ``sddmm(W, A, B)``  | V = A.B^T at W's entries | dA = spmm(dV, B), dB = spmm_t(dV, A)             |

An activation is a tensor one of whose dimensions, ``dim``, holds the features; all its other
dimensions together are the n columns of the product. ``dim=-1`` is nn.Linear's layout and
channels_last, ``dim=1`` is NCHW. No layout is copied; only a tensor whose columns need more than
three strides is made contiguous first.
"""

from __future__ import annotations

import torch

from torch_csb import autograd
from torch_csb.autograd import ACTIVATIONS
from torch_csb.matrix import CSBMatrix


def _activation_index(activation: str | None) -> int:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'relu', 'relu6', 'silu' or 'gelu', got {activation!r}")
    return ACTIVATIONS[activation]


def spmm(
    w: CSBMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    dim: int = -1,
) -> torch.Tensor:
    """Y = act(W.X + bias).

    Args:
        w: m x k (a transposed view multiplies by its transpose).
        x: any shape with k features in dimension ``dim``, dtype and device of ``w``.
        bias: ``[m]`` or None.
        activation: None, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"gelu"`` (erf).
        dim: the dimension of x that holds the features.

    Returns:
        Contiguous, the shape of x with m in dimension ``dim``. 16-bit products are accumulated in
        float32. The same inputs give the same bits on every run.

    Raises:
        ValueError: unknown activation.
        RuntimeError: dtype, device or shape do not fit.

    Like ``torch.nn.functional.linear(x, w.to_dense(), bias)`` for ``dim=-1``.
    """
    op = autograd.spmm_t if w.transposed else autograd.spmm
    return op(
        w.values, w.codes, w.blk_ptr, w.blk_pad, w.units, x, bias,
        w.m, w.k, w.block_size, dim, _activation_index(activation),
    )  # fmt: skip


def spmm_t(
    w: CSBMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    dim: int = -1,
) -> torch.Tensor:
    """Y = act(W^T.X + bias), from W's own arrays: ``spmm(w.t(), x, bias)``.

    x has m features in dimension ``dim``, Y has k; everything else is as for :func:`spmm`.
    """
    return spmm(w.t(), x, bias, activation=activation, dim=dim)


def sddmm(w: CSBMatrix, a: torch.Tensor, b: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
    """V[e] = sum_j A[row(e), j] * B[col(e), j] for every entry e of W: A.B^T sampled at W's pattern.

    Args:
        w: m x k; only its pattern is used.
        a: m features in dimension ``dim``.
        b: k features in dimension ``dim``, otherwise the shape of a; same dtype and device.

    Returns:
        ``[stored]`` in W's entry order, exactly 0 at padding entries.

    Raises:
        RuntimeError: dtype, device or shape do not fit.

    Source: the gradient of a sparse weight; "sampled dense-dense matrix multiplication",
    Canny and Zhao, "Bidmach", 2013.
    """
    if w.transposed:
        a, b = b, a
    stored = w.values.numel()
    return autograd.sddmm(w.codes, w.blk_ptr, w.blk_pad, w.units, a, b, w.m, w.k, w.block_size, stored, dim)


def linear(
    x: torch.Tensor, w: CSBMatrix, bias: torch.Tensor | None = None, *, activation: str | None = None
) -> torch.Tensor:
    """act(x.W^T + bias) for x of shape ``[..., k]``, as ``torch.nn.functional.linear``."""
    return spmm(w, x, bias, activation=activation)


def conv2d(
    x: torch.Tensor,
    w: CSBMatrix,
    bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    activation: str | None = None,
) -> torch.Tensor:
    """A 1x1 convolution, as ``torch.nn.functional.conv2d(x, w[:, :, None, None], bias, stride)``.

    Args:
        x: ``[b, k, height, width]`` or ``[k, height, width]``, contiguous or channels_last.
        w: m x k.

    Returns:
        ``[b, m, ceil(height / stride), ceil(width / stride)]`` in the memory format of x.
    """
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected [b, k, height, width] or [k, height, width], got shape {tuple(x.shape)}")
    last = has_features_last(x)
    rows, cols = (stride, stride) if isinstance(stride, int) else stride
    if rows != 1 or cols != 1:
        x = x[..., ::rows, ::cols]
    if last:
        return spmm(w, x.movedim(-3, -1), bias, activation=activation).movedim(-1, -3)
    return spmm(w, x, bias, activation=activation, dim=-3)


def has_features_last(x: torch.Tensor) -> bool:
    """Whether an image ``[..., c, h, w]`` is channels_last, told by its strides so that a view of one counts too."""
    return x.stride(-3) == 1 and x.stride(-1) >= x.size(-3)
