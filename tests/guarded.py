"""Tensors beside memory that no one may touch: an access one element outside ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from torch_csb import CSBMatrix

_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def guarded(tensor: Tensor, side: str) -> Tensor:
    """The same elements and strides in memory whose ``side`` ("begin" or "end") lies at a page that can't be accessed.

    Loads that the compiler's sanitizer can't see (gathers, masked loads) fault here all the same.
    """
    if tensor.numel() == 0:
        return tensor
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((length,), (1,), tensor.storage_offset())
    page = mmap.PAGESIZE
    pages = -(-length * tensor.element_size() // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (address, address + (pages + 1) * page):
        if _LIBC.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if side == "begin" else (pages + 1) * page - length * tensor.element_size()
    there = torch.frombuffer(memory, dtype=tensor.dtype, count=length, offset=offset)
    return there.copy_(flat).as_strided(tensor.shape, tensor.stride(), 0)


def guarded_matrix(w: CSBMatrix, side: str) -> CSBMatrix:
    arrays = (guarded(array, side) for array in (w.values, w.codes, w.blk_ptr, w.blk_pad, w.units))
    return CSBMatrix(*arrays, m=w.m, k=w.k, layout=w.layout)
