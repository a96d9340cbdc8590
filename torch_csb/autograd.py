"""Derivatives. The backward of each operator is made of the other two, so they nest to any order.

    Y = W.X + b      dX = W^T.dY      dW = (dY.X^T at W's entries)      db = dY.1
    Y = W^T.X + b    dX = W.dY        dW = (X.dY^T at W's entries)      db = dY.1
    V = (A.B^T at W's entries)        dA = dV.B                         dB = dV^T.A

where dV stands for the matrix of W's pattern with the values dV. relu and relu6 are differentiated
through Y, which tells where they are active; silu and gelu run after the operator when a gradient
is needed.

These are the functions that the modules call: plain tensors in, plain tensors out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torch_csb import _load  # noqa: F401  (registers the operators)


_spmm = torch.ops.torch_csb.spmm.default
_spmm_t = torch.ops.torch_csb.spmm_t.default
_sddmm = torch.ops.torch_csb.sddmm.default

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4}
_RELU, _RELU6, _SILU, _GELU = 1, 2, 3, 4


def _bias_grad(grad: torch.Tensor, dim: int) -> torch.Tensor:
    dim = dim % grad.dim()
    others = [d for d in range(grad.dim()) if d != dim]
    return grad.sum(others) if others else grad


def _activation_grad(grad: torch.Tensor, y: torch.Tensor, activation: int) -> torch.Tensor:
    if activation == _RELU:
        return torch.where(y <= 0, 0, grad)
    if activation == _RELU6:
        return torch.where((y <= 0) | (y >= 6), 0, grad)
    return grad


class _SpMM(torch.autograd.Function):
    """Y = relu-like(op(W).X + bias); ``transposed`` picks op."""

    @staticmethod
    def forward(ctx, values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation, transposed):
        op = _spmm_t if transposed else _spmm
        y = op(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation)
        ctx.save_for_backward(values, codes, blk_ptr, blk_pad, units, x, y if activation else None)
        ctx.sizes = (m, k, block_size, dim)
        ctx.activation = activation
        ctx.transposed = transposed
        return y

    @staticmethod
    def backward(ctx, grad):
        values, codes, blk_ptr, blk_pad, units, x, y = ctx.saved_tensors
        m, k, block_size, dim = ctx.sizes
        if ctx.activation:
            grad = _activation_grad(grad, y, ctx.activation)
        grad_values = grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            a, b = (x, grad) if ctx.transposed else (grad, x)
            grad_values = sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim)
        if ctx.needs_input_grad[5]:
            other = spmm if ctx.transposed else spmm_t
            grad_x = other(values, codes, blk_ptr, blk_pad, units, grad, None, m, k, block_size, dim, 0)
        if ctx.needs_input_grad[6]:
            grad_bias = _bias_grad(grad, dim)
        return grad_values, None, None, None, None, grad_x, grad_bias, None, None, None, None, None, None


class _SDDMM(torch.autograd.Function):
    """V = A.B^T at W's entries."""

    @staticmethod
    def forward(ctx, codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim):
        ctx.save_for_backward(codes, blk_ptr, blk_pad, units, a, b)
        ctx.sizes = (m, k, block_size, dim)
        return _sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim)

    @staticmethod
    def backward(ctx, grad):
        codes, blk_ptr, blk_pad, units, a, b = ctx.saved_tensors
        grad = grad.contiguous()
        grad_a = grad_b = None
        if ctx.needs_input_grad[4]:
            grad_a = spmm(grad, codes, blk_ptr, blk_pad, units, b, None, *ctx.sizes, 0)
        if ctx.needs_input_grad[5]:
            grad_b = spmm_t(grad, codes, blk_ptr, blk_pad, units, a, None, *ctx.sizes, 0)
        return None, None, None, None, grad_a, grad_b, None, None, None, None


def _multiply(
    op, transposed, values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation
) -> torch.Tensor:
    if torch.is_autocast_enabled(x.device.type) and values.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        values, x = values.to(dtype), x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not (
        torch.is_grad_enabled()
        and (values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        return op(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation)
    fused = activation if activation in (0, _RELU, _RELU6) else 0
    y = _SpMM.apply(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, fused, transposed)
    if fused == activation:
        return y
    return F.silu(y) if activation == _SILU else F.gelu(y)


def spmm(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation) -> torch.Tensor:
    """Y = act(W.X + bias), differentiable in values, x and bias."""
    return _multiply(
        _spmm, False, values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation
    )


def spmm_t(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation) -> torch.Tensor:
    """Y = act(W^T.X + bias), differentiable in values, x and bias."""
    return _multiply(
        _spmm_t, True, values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation
    )


def sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim) -> torch.Tensor:
    """The entries of A.B^T that W stores, ``[stored]``, differentiable in a and b."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _SDDMM.apply(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim)
    return _sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim)
