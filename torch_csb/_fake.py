"""What torch needs to know about the operators without running them: shapes, strides, FLOPs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from torch_csb import _load  # noqa: F401  (registers the operators)
from torch_csb.layout import BITMAP_BLOCK

_ops = torch.ops.torch_csb


def _product(values, x, features: int, dim: int) -> torch.Tensor:
    if values.device != x.device:
        hint = "; load the layer's state with load_into, or load_state_dict(…, assign=True)" if values.is_meta else ""
        raise RuntimeError(f"values: expected a tensor on {x.device} like x, got one on {values.device}{hint}")
    shape = list(x.shape)
    shape[dim] = features
    return values.new_empty(shape)


@torch.library.register_fake("torch_csb::spmm")
def _(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation):
    return _product(values, x, m, dim)


@torch.library.register_fake("torch_csb::spmm_t")
def _(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, activation):
    return _product(values, x, k, dim)


@torch.library.register_fake("torch_csb::sddmm")
def _(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, stored, dim):
    if codes.device != a.device:
        raise RuntimeError(f"codes: expected a tensor on {a.device} like a, got one on {codes.device}")
    return a.new_empty(stored)


def _blocks(m: int, k: int, block_size: int) -> int:
    return -(-m // block_size) * -(-k // block_size)


@torch.library.register_fake("torch_csb::count")
def _(dense, mask, block_size):
    return dense.new_empty(_blocks(*dense.shape, block_size), dtype=torch.int32)


@torch.library.register_fake("torch_csb::pack")
def _(dense, mask, blk_ptr, blk_pad, block_size, stored):
    return dense.new_empty(stored), dense.new_empty(2 * stored, dtype=torch.uint8)


@torch.library.register_fake("torch_csb::pack_bitmap")
def _(dense, mask, blk_ptr, blk_pad, stored):
    words = BITMAP_BLOCK * _blocks(*dense.shape, BITMAP_BLOCK)
    return dense.new_empty(stored), dense.new_empty(words, dtype=torch.int64)


@torch.library.register_fake("torch_csb::to_codes")
def _(bitmap, blk_ptr, blk_pad, m, k, stored):
    return bitmap.new_empty(2 * stored, dtype=torch.uint8)


@torch.library.register_fake("torch_csb::unpack")
def _(values, codes, blk_ptr, blk_pad, m, k, block_size):
    return values.new_empty(m, k)


@torch.library.register_fake("torch_csb::plan")
def _(blk_ptr, blk_pad, mb, kb):
    num_units = torch.library.get_ctx().new_dynamic_size()
    return blk_ptr.new_empty(2, num_units)


@torch.library.register_fake("torch_csb::csr_row_split")
@torch.library.register_fake("torch_csb::csr_merge")
@torch.library.register_fake("torch_csb::csr_row_swizzle")
def _(values, row_ptr, col_ind, row_order, x):
    if values.device != x.device:
        raise RuntimeError(f"values: expected a tensor on {x.device} like x, got one on {values.device}")
    return values.new_empty(row_ptr.shape[0] - 1, x.shape[1])


@torch.library.register_fake("torch_csb::csr_sddmm")
def _(row_ptr, col_ind, row_order, a, b):
    if row_ptr.device != a.device:
        raise RuntimeError(f"row_ptr: expected a tensor on {a.device} like a, got one on {row_ptr.device}")
    return a.new_empty(col_ind.shape[0])


def _columns(shape, dim: int) -> int:
    columns = 1
    for d, size in enumerate(shape):
        if d != dim % len(shape):
            columns *= size
    return columns


@register_flop_formula([_ops.spmm, _ops.spmm_t])
def _spmm_flops(values, codes, blk_ptr, blk_pad, units, x, bias, m, k, block_size, dim, *args, **kwargs) -> int:
    return 2 * values[0] * _columns(x, dim)


@register_flop_formula(_ops.sddmm)
def _sddmm_flops(codes, blk_ptr, blk_pad, units, a, b, m, k, block_size, stored, dim, *args, **kwargs) -> int:
    return 2 * stored * _columns(a, dim)


@register_flop_formula([_ops.csr_row_split, _ops.csr_merge, _ops.csr_row_swizzle])
def _csr_spmm_flops(values, row_ptr, col_ind, row_order, x, *args, **kwargs) -> int:
    return 2 * values[0] * x[1]


@register_flop_formula(_ops.csr_sddmm)
def _csr_sddmm_flops(row_ptr, col_ind, row_order, a, b, *args, **kwargs) -> int:
    return 2 * col_ind[0] * a[1]
