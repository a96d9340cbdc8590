"""Derivatives. The backward of each operator is made of the other two, so they nest to any order.

    Y = W.X + b      dX = W^T.dY      dW = (dY.X^T at W's entries)      db = dY.1
    Y = W^T.X + b    dX = W.dY        dW = (X.dY^T at W's entries)      db = dY.1
    V = (A.B^T at W's entries)        dA = dV.B                         dB = dV^T.A

where dV stands for the matrix of W's pattern with the values dV. relu and relu6 are differentiated
through Y, which tells where they are active; silu and gelu run after the operator when a gradient
is needed.

These are the functions that the modules call: plain tensors in, plain tensors out. A small layer's time is
spent here, in Python, which is why the two shortcuts below stand beside the ways that torch documents.
What torch.func and forward-mode AD need is in _transforms.py.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from torch_csb import _load  # noqa: F401  (registers the operators)

_spmm = torch.ops.torch_csb.spmm.default
_spmm_t = torch.ops.torch_csb.spmm_t.default
_sddmm = torch.ops.torch_csb.sddmm.default

# An operator without the Python frame of OpOverload.__call__, half a microsecond; not for tracing.
_fast_spmm = _spmm._op
_fast_spmm_t = _spmm_t._op
_fast_sddmm = _sddmm._op
_any_autocast = torch._C._is_any_autocast_enabled
_compiler = torch.compiler  # whose is_compiling() is these two, a tenth of a microsecond later
_functorch_active = torch._C._are_functorch_transforms_active

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


def product_grads(needs, grad, values, x, pattern, sizes, transposed):
    """Gradients of op(W).X + bias for values, x and bias, None where ``needs`` says so."""
    needs_values, needs_x, needs_bias = needs[:3]
    grad_values = grad_x = grad_bias = None
    if needs_values:
        a, b = (x, grad) if transposed else (grad, x)
        grad_values = sddmm(*pattern, a, b, *sizes[:3], values.shape[0], sizes[3])
    if needs_x:
        other = spmm if transposed else spmm_t
        grad_x = other(values, *pattern, grad, None, *sizes, 0)
    if needs_bias:
        grad_bias = _bias_grad(grad, sizes[-1])
    return grad_values, grad_x, grad_bias


def sampled_grads(needs, grad, a, b, pattern, sizes):
    """Gradients of A.B^T at W's entries for a and b, None where ``needs`` says so; ``sizes`` as sddmm takes them."""
    m, k, block_size, _, dim = sizes
    sizes = (m, k, block_size, dim)
    grad = grad.contiguous()
    grad_a = spmm(grad, *pattern, b, None, *sizes, 0) if needs[0] else None
    grad_b = spmm_t(grad, *pattern, a, None, *sizes, 0) if needs[1] else None
    return grad_a, grad_b


class _SpMM(torch.autograd.Function):
    """Y = act(op(W).X + bias), act one of none, relu and relu6.

    ``pattern`` is (codes, blk_ptr, blk_pad, units), ``sizes`` is (m, k, block_size, dim).
    """

    @staticmethod
    def forward(ctx, values, x, bias, pattern, sizes, activation, transposed):
        op = _fast_spmm_t if transposed else _fast_spmm
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
        grads = product_grads(ctx.needs_input_grad, grad, values, x, ctx.pattern, ctx.sizes, ctx.transposed)
        return (*grads, None, None, None, None)


class _SDDMM(torch.autograd.Function):
    """V = A.B^T at W's entries. ``sizes`` is (m, k, block_size, stored, dim)."""

    @staticmethod
    def forward(ctx, a, b, pattern, sizes):
        ctx.save_for_backward(a, b)
        ctx.pattern = pattern
        ctx.sizes = sizes
        return _fast_sddmm(*pattern, a, b, *sizes)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return (*sampled_grads(ctx.needs_input_grad, grad, a, b, ctx.pattern, ctx.sizes), None, None)


# Function.apply without its Python frame, two microseconds that only functorch and tracing need.
_fast_spmm_apply = super(torch.autograd.Function, _SpMM).apply
_fast_sddmm_apply = super(torch.autograd.Function, _SDDMM).apply


def _differentiable(transposed, values, pattern, x, bias, sizes, activation) -> torch.Tensor:
    fused = activation if activation in (0, _RELU, _RELU6) else 0
    y = _fast_spmm_apply(values, x, bias, pattern, sizes, fused, transposed)
    if fused == activation:
        return y
    return F.silu(y) if activation == _SILU else F.gelu(y)


def _needs_grad(values: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)


def _autocast(values, x, bias):
    """What F.linear casts: float64 and integers stay as they are, for the operator to refuse."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return values, x, bias
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in (values, x, bias)
    )


def _under_functorch() -> bool:
    return _functorch_active()


# What torch.compiler.assume_constant_result() does, after an import of the whole compiler, which guards it anyway.
_under_functorch._dynamo_marked_constant = True


def _plain_trace() -> bool:
    """Whether what is traced is outside every transform; inside one, _transforms.py leaves it to eager mode."""
    return not _under_functorch() and forward_ad._current_level < 0


def spmm(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation) -> torch.Tensor:
    """Y = act(W.X + bias), differentiable in values, x and bias."""
    if _any_autocast():
        values, x, bias = _autocast(values, x, bias)
    if (is_dynamo_compiling() or _compiler._is_compiling_flag) and _plain_trace():
        return _product(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation, False)
    if _functorch_active() or forward_ad._current_level >= 0:
        pattern, sizes = (codes, blk_ptr, blk_pad, units), (m, k, block_size, dim)
        return _transforms().product(False, values, pattern, x, bias, sizes, activation)
    if torch.is_grad_enabled() and _needs_grad(values, x, bias):
        pattern, sizes = (codes, blk_ptr, blk_pad, units), (m, k, block_size, dim)
        return _differentiable(False, values, pattern, x, bias, sizes, activation)
    return _fast_spmm(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation)


def spmm_t(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation) -> torch.Tensor:
    """Y = act(W^T.X + bias), differentiable in values, x and bias."""
    if _any_autocast():
        values, x, bias = _autocast(values, x, bias)
    if (is_dynamo_compiling() or _compiler._is_compiling_flag) and _plain_trace():
        return _product(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation, True)
    if _functorch_active() or forward_ad._current_level >= 0:
        pattern, sizes = (codes, blk_ptr, blk_pad, units), (m, k, block_size, dim)
        return _transforms().product(True, values, pattern, x, bias, sizes, activation)
    if torch.is_grad_enabled() and _needs_grad(values, x, bias):
        pattern, sizes = (codes, blk_ptr, blk_pad, units), (m, k, block_size, dim)
        return _differentiable(True, values, pattern, x, bias, sizes, activation)
    return _fast_spmm_t(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation)


def sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, stored, dim) -> torch.Tensor:
    """The entries of A.B^T that W stores, ``[stored]``, differentiable in a and b."""
    if (is_dynamo_compiling() or _compiler._is_compiling_flag) and _plain_trace():
        return _sampled(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, stored, dim)
    if _functorch_active() or forward_ad._current_level >= 0:
        return _transforms().sampled((codes, blk_ptr, blk_pad, units), a, b, (m, k, block_size, stored, dim))
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _fast_sddmm_apply(a, b, (codes, blk_ptr, blk_pad, units), (m, k, block_size, stored, dim))
    return _fast_sddmm(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, stored, dim)


def _transforms() -> ModuleType:
    from torch_csb import _transforms  # it is made of the functions above

    return _transforms


# What the compiler's graphs hold. A composite operator is taken apart where gradients, vmap and the rest are worked
# out, so the functions above alone say what those are, and what is left for a backend are spmm, spmm_t and sddmm.
_library = torch.library.Library("torch_csb", "FRAGMENT")
_library.define(
    "product(Tensor values, Tensor codes, Tensor blk_ptr, Tensor blk_pad, Tensor units, Tensor x, Tensor? bias, "
    "int m, int k, int block_size, int dim, int activation, bool transposed) -> Tensor"
)
_library.define(
    "sampled(Tensor codes, Tensor blk_ptr, Tensor blk_pad, Tensor units, Tensor a, Tensor b, "
    "int m, int k, int block_size, SymInt stored, int dim) -> Tensor"
)


@torch.library.impl(_library, "product", "CompositeImplicitAutograd")
def _(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation, transposed):
    pattern, sizes = (codes, blk_ptr, blk_pad, units), (m, k, block_size, dim)
    if _functorch_active() or forward_ad._current_level >= 0:
        return _transforms().product(transposed, values, pattern, x, bias, sizes, activation)
    if torch.is_grad_enabled() and _needs_grad(values, x, bias):
        return _differentiable(transposed, values, pattern, x, bias, sizes, activation)
    return (_spmm_t if transposed else _spmm)(values, *pattern, x, bias, *sizes, activation)


@torch.library.impl(_library, "sampled", "CompositeImplicitAutograd")
def _(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, stored, dim):
    pattern, sizes = (codes, blk_ptr, blk_pad, units), (m, k, block_size, stored, dim)
    if _functorch_active() or forward_ad._current_level >= 0:
        return _transforms().sampled(pattern, a, b, sizes)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _fast_sddmm_apply(a, b, pattern, sizes)
    return _sddmm(*pattern, a, b, *sizes)


_product = torch.ops.torch_csb.product.default
_sampled = torch.ops.torch_csb.sampled.default
