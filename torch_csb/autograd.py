"""Derivatives. The backward of each operator is made of the other two, so they nest to any order.

    Y = W.X + b      dX = W^T.dY      dW = (dY.X^T at W's entries)      db = dY.1
    Y = W^T.X + b    dX = W.dY        dW = (X.dY^T at W's entries)      db = dY.1
    V = (A.B^T at W's entries)        dA = dV.B                         dB = dV^T.A

where dV stands for the matrix of W's pattern with the values dV. relu and relu6 are differentiated
through Y, which tells where they are active; silu and gelu run after the operator when a gradient
is needed.

These are the functions that the modules call: plain tensors in, plain tensors out. A small layer's time is
spent here, in Python, which is why the two shortcuts below stand beside the ways that torch documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from torch_csb import _load  # noqa: F401  (registers the operators)

_spmm = torch.ops.torch_csb.spmm.default
_spmm_t = torch.ops.torch_csb.spmm_t.default
_sddmm = torch.ops.torch_csb.sddmm.default

# An operator without the Python frame of OpOverload.__call__, half a microsecond; not for tracing.
_fast_spmm = _spmm._op
_fast_spmm_t = _spmm_t._op
_fast_sddmm = _sddmm._op
_any_autocast = torch._C._is_any_autocast_enabled

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
    """Y = act(op(W).X + bias), act one of none, relu and relu6.

    ``pattern`` is (codes, blk_ptr, blk_pad, units), ``sizes`` is (m, k, block_size, dim).
    """

    @staticmethod
    def forward(ctx, values, x, bias, pattern, sizes, activation, transposed):
        op = (_spmm_t if transposed else _spmm) if is_compiling() else _fast_spmm_t if transposed else _fast_spmm
        y = op(values, *pattern, x, bias, *sizes, activation)
        if activation:
            ctx.save_for_backward(values, x, y)
        else:
            ctx.save_for_backward(values, x)
        # The pattern is integers: nothing differentiates it, so it needs none of save_for_backward's bookkeeping.
        ctx.pattern = pattern
        ctx.sizes = sizes
        ctx.activation = activation
        ctx.transposed = transposed
        return y

    @staticmethod
    def backward(ctx, grad):
        values, x, *y = ctx.saved_tensors
        if ctx.activation:
            grad = _activation_grad(grad, y[0], ctx.activation)
        needs_values, needs_x, needs_bias = ctx.needs_input_grad[:3]
        grad_values = grad_x = grad_bias = None
        if needs_values:
            a, b = (x, grad) if ctx.transposed else (grad, x)
            grad_values = sddmm(*ctx.pattern, a, b, *ctx.sizes)
        if needs_x:
            other = spmm if ctx.transposed else spmm_t
            grad_x = other(values, *ctx.pattern, grad, None, *ctx.sizes, 0)
        if needs_bias:
            grad_bias = _bias_grad(grad, ctx.sizes[-1])
        return grad_values, grad_x, grad_bias, None, None, None, None


class _SDDMM(torch.autograd.Function):
    """V = A.B^T at W's entries."""

    @staticmethod
    def forward(ctx, a, b, pattern, sizes):
        ctx.save_for_backward(a, b)
        ctx.pattern = pattern
        ctx.sizes = sizes
        return _sddmm(*pattern, a, b, *sizes)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad = grad.contiguous()
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = spmm(grad, *ctx.pattern, b, None, *ctx.sizes, 0)
        if ctx.needs_input_grad[1]:
            grad_b = spmm_t(grad, *ctx.pattern, a, None, *ctx.sizes, 0)
        return grad_a, grad_b, None, None


# Function.apply without its Python frame, two microseconds that only functorch and tracing need.
_fast_spmm_apply = super(torch.autograd.Function, _SpMM).apply
_fast_sddmm_apply = super(torch.autograd.Function, _SDDMM).apply


def _traced() -> bool:
    return is_compiling() or torch._C._are_functorch_transforms_active()


def _differentiable(transposed, values, pattern, x, bias, sizes, activation) -> torch.Tensor:
    fused = activation if activation in (0, _RELU, _RELU6) else 0
    apply = _SpMM.apply if _traced() else _fast_spmm_apply
    y = apply(values, x, bias, pattern, sizes, fused, transposed)
    if fused == activation:
        return y
    return F.silu(y) if activation == _SILU else F.gelu(y)


def _needs_grad(values: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)


def _autocast(values, x, bias):
    device = x.device.type
    if values.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return values, x, bias
    dtype = torch.get_autocast_dtype(device)
    return values.to(dtype), x.to(dtype), None if bias is None else bias.to(dtype)


def _refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """The operators would drop a tangent silently."""
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "torch_csb has no forward-mode derivatives (jvp, jacfwd, forward_ad): "
                "use reverse mode (backward, torch.autograd.grad, torch.func.grad, vjp or jacrev)"
            )


def spmm(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation) -> torch.Tensor:
    """Y = act(W.X + bias), differentiable in values, x and bias."""
    if _any_autocast():
        values, x, bias = _autocast(values, x, bias)
    if forward_ad._current_level >= 0:
        _refuse_tangents(values, x, bias)
    if torch.is_grad_enabled() and _needs_grad(values, x, bias):
        pattern, sizes = (codes, blk_ptr, blk_pad, units), (m, k, block_size, dim)
        return _differentiable(False, values, pattern, x, bias, sizes, activation)
    op = _spmm if is_compiling() else _fast_spmm
    return op(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation)


def spmm_t(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation) -> torch.Tensor:
    """Y = act(W^T.X + bias), differentiable in values, x and bias."""
    if _any_autocast():
        values, x, bias = _autocast(values, x, bias)
    if forward_ad._current_level >= 0:
        _refuse_tangents(values, x, bias)
    if torch.is_grad_enabled() and _needs_grad(values, x, bias):
        pattern, sizes = (codes, blk_ptr, blk_pad, units), (m, k, block_size, dim)
        return _differentiable(True, values, pattern, x, bias, sizes, activation)
    op = _spmm_t if is_compiling() else _fast_spmm_t
    return op(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation)


def sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim) -> torch.Tensor:
    """The entries of A.B^T that W stores, ``[stored]``, differentiable in a and b."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(a, b)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        apply = _SDDMM.apply if _traced() else _fast_sddmm_apply
        return apply(a, b, (codes, blk_ptr, blk_pad, units), (m, k, block_size, dim))
    op = _sddmm if is_compiling() else _fast_sddmm
    return op(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, dim)
