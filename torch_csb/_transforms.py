"""The operators under torch.func's transforms (grad, vjp, jvp, vmap and what is made of them) and forward-mode AD.

    Y = W.X + b    dY = dW.X + W.dX + db        V = (A.B^T at W's entries)    dV = dA.B^T + A.dB^T at W's entries

Each rule is made of the differentiable operators themselves, so the transforms nest. These are the twins of the
Functions in autograd.py, which are quicker to call and know reverse mode alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from torch_csb import autograd

_spmm = torch.ops.torch_csb.spmm.default
_spmm_t = torch.ops.torch_csb.spmm_t.default
_sddmm = torch.ops.torch_csb.sddmm.default
_AFTER = {0: lambda y: y, 1: F.relu, 2: F.relu6, 3: F.silu, 4: F.gelu}


def _stay_eager() -> None:
    """Keeps torch.compile from taking a forward for the whole of a Function, whose rules a graph would lose."""
    if is_dynamo_compiling():
        message = "torch_csb's operators inside a torch.func transform or forward_ad are not compiled"
        torch._dynamo.graph_break(msg=message)


def product(transposed, values, pattern, x, bias, sizes, activation: int) -> Tensor:
    """Y = act(op(W).X + bias) of tensors that a transform may have wrapped."""
    _stay_eager()
    return _AFTER[activation](_Product.apply(values, x, bias, *pattern, sizes, transposed))


def sampled(pattern, a, b, sizes) -> Tensor:
    """V = A.B^T at W's entries, of tensors that a transform may have wrapped."""
    _stay_eager()
    return _Sampled.apply(a, b, *pattern, sizes)


def _multiply(transposed: bool, values: Tensor, pattern, x: Tensor, bias: Tensor | None, sizes) -> Tensor:
    op = autograd.spmm_t if transposed else autograd.spmm
    return op(values.contiguous(), *pattern, x, bias, *sizes, 0)


def _along(bias: Tensor, y: Tensor, dim: int) -> Tensor:
    """The bias in the shape of y."""
    return bias.view([-1 if d == dim % y.dim() else 1 for d in range(y.dim())]).expand(y.shape)


class _Product(torch.autograd.Function):
    """Y = op(W).X + bias. ``sizes`` is (m, k, block_size, dim)."""

    @staticmethod
    def forward(values, x, bias, codes, blk_ptr, blk_pad, units, sizes, transposed):
        _stay_eager()
        op = _spmm_t if transposed else _spmm
        return op(values, codes, blk_ptr, blk_pad, units, x, bias, *sizes, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        values, x, _, *pattern, ctx.sizes, ctx.transposed = inputs
        ctx.save_for_backward(values, x, output, *pattern)
        ctx.save_for_forward(values, x, output, *pattern)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None):
        if grad is None:
            return (None,) * 9
        values, x, _, *pattern = ctx.saved_tensors
        grads = autograd.product_grads(ctx.needs_input_grad, grad, values, x, pattern, ctx.sizes, ctx.transposed)
        return (*grads, *(None,) * 6)

    @staticmethod
    def jvp(ctx: Any, d_values, d_x, d_bias, *_):
        values, x, y, *pattern = ctx.saved_tensors
        terms = []
        if d_x is not None:
            terms.append(_multiply(ctx.transposed, values, pattern, d_x, None, ctx.sizes))
        if d_values is not None:
            terms.append(_multiply(ctx.transposed, d_values, pattern, x, None, ctx.sizes))
        if d_bias is not None:
            terms.append(_along(d_bias, y, ctx.sizes[-1]))
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, values, x, bias, codes, blk_ptr, blk_pad, units, sizes, transposed):
        def one(values, x, bias, *pattern, sizes=sizes):
            return _multiply(transposed, values, pattern, x, bias, sizes)

        tensors, dims = (values, x, bias, codes, blk_ptr, blk_pad, units), in_dims[:7]
        m, k, block_size, dim = sizes
        if dims.count(None) == 6 and dims[1] is not None:
            # The batch is more columns of one product.
            x = x.movedim(dims[1], 0)
            return one(values, x, *tensors[2:], sizes=(m, k, block_size, dim + 1 if dim >= 0 else dim)), 0
        shape = _shape(x, dims[1])
        shape[dim] = k if transposed else m
        return _each(info.batch_size, dims, tensors, one, x.new_empty(0, *shape))


class _Sampled(torch.autograd.Function):
    """V = A.B^T at W's entries. ``sizes`` is (m, k, block_size, stored, dim)."""

    @staticmethod
    def forward(a, b, codes, blk_ptr, blk_pad, units, sizes):
        _stay_eager()
        return _sddmm(codes, blk_ptr, blk_pad, units, a, b, *sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        a, b, *pattern, ctx.sizes = inputs
        ctx.save_for_backward(a, b, *pattern)
        ctx.save_for_forward(a, b, *pattern)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None):
        if grad is None:
            return (None,) * 7
        a, b, *pattern = ctx.saved_tensors
        grads = autograd.sampled_grads(ctx.needs_input_grad, grad, a, b, pattern, ctx.sizes)
        return (*grads, *(None,) * 5)

    @staticmethod
    def jvp(ctx: Any, d_a, d_b, *_):
        a, b, *pattern = ctx.saved_tensors
        terms = [
            autograd.sddmm(*pattern, left, right, *ctx.sizes)
            for left, right in ((d_a, b), (a, d_b))
            if left is not None and right is not None
        ]
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, a, b, codes, blk_ptr, blk_pad, units, sizes):
        def one(a, b, *pattern):
            return autograd.sddmm(*pattern, a, b, *sizes)

        tensors, dims = (a, b, codes, blk_ptr, blk_pad, units), in_dims[:6]
        return _each(info.batch_size, dims, tensors, one, a.new_empty(0, sizes[3]))


def _shape(tensor: Tensor, batch_dim: int | None) -> list[int]:
    """The shape that one element of the batch has."""
    return [size for d, size in enumerate(tensor.shape) if d != batch_dim]


def _each(
    batch_size: int, in_dims: tuple, tensors: tuple, one: Callable[..., Tensor], none: Tensor
) -> tuple[Tensor, int]:
    """A call for each element of the batch, for an operator multiplies by one matrix; ``none`` is the empty result."""

    def element(i: int) -> Tensor:
        pairs = zip(tensors, in_dims, strict=True)
        return one(*(t if dim is None else t.select(dim, i).contiguous() for t, dim in pairs))

    return (torch.stack([element(i) for i in range(batch_size)]) if batch_size else none), 0
