"""Who computes a product: CSB, dense, torch's CSR and our CSR baselines behind one interface.

X has k features, Y has m, both n columns; layout "last" is [n, features], "first" is [features, n]. Directions: "F"
Y = W.X, "T" X = W^T.Y, "dW" the entries of Y.X^T where W has nonzeros (dense computes all of them).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_csb import CSBMatrix, baselines, ops, reference


class Implementation(ABC):
    """A form of W and the products that it offers.

    Attributes:
        name: the CSV's ``impl``.
        layouts: those of the activations that it takes.
        fastest_layout: whether only the faster of its layouts becomes a row.
    """

    name: str
    layouts: tuple[str, ...] = ("last", "first")
    fastest_layout = True

    @abstractmethod
    def pack(self, dense: Tensor, direction: str) -> Any:
        """W in this form, from a dense [m, k] with zeros."""

    @abstractmethod
    def arrays(self, w: Any) -> list[Tensor]:
        """The tensors that a product reads of W."""

    @abstractmethod
    def with_arrays(self, w: Any, arrays: Sequence[Tensor]) -> Any:
        """W on other copies of its arrays."""

    @abstractmethod
    def multiply(self, w: Any, direction: str, layout: str, x: Tensor | None, y: Tensor | None) -> Any:
        """The product; x or y is None where the direction doesn't need it."""

    @abstractmethod
    def unpack(self, w: Any, direction: str) -> Tensor:
        """The dense [m, k] that this form holds."""

    def sampled(self, w: Any, result: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A result of direction "dW" as (numbers, rows, columns)."""
        raise NotImplementedError

    def flops(self, w: Any, n: int) -> float:
        return 2.0 * self.nonzeros(w) * n

    @abstractmethod
    def nonzeros(self, w: Any) -> int:
        """Elements that it multiplies."""


class Dense(Implementation):
    """cuBLAS, oneDNN or MKL on the weight with its zeros in it."""

    name = "dense"

    def pack(self, dense: Tensor, direction: str) -> Tensor:
        return dense

    def arrays(self, w: Tensor) -> list[Tensor]:
        return [w]

    def with_arrays(self, w: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        return arrays[0]

    def multiply(self, w: Tensor, direction: str, layout: str, x: Tensor | None, y: Tensor | None) -> Tensor:
        if direction == "F":
            return F.linear(x, w) if layout == "last" else w @ x
        if direction == "T":
            return y @ w if layout == "last" else w.t() @ y
        return y.t() @ x if layout == "last" else y @ x.t()

    def unpack(self, w: Tensor, direction: str) -> Tensor:
        return w

    def sampled(self, w: Tensor, result: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row, col = w.nonzero(as_tuple=True)
        return result[row, col], row, col

    def nonzeros(self, w: Tensor) -> int:
        return w.numel()


class DenseTF32(Dense):
    """The same on tensor cores, float32 rounded to TF32: 10 bits of mantissa."""

    name = "dense_tf32"

    def multiply(self, w: Tensor, direction: str, layout: str, x: Tensor | None, y: Tensor | None) -> Tensor:
        if w.dtype != torch.float32 or not w.is_cuda:
            raise NotImplementedError("TF32 is a mode of float32 on CUDA")
        with tf32(True):
            return super().multiply(w, direction, layout, x, y)


class CSB(Implementation):
    name = "csb"
    fastest_layout = False

    def pack(self, dense: Tensor, direction: str) -> CSBMatrix:
        return CSBMatrix.from_dense(dense, target=dense.device.type)

    def arrays(self, w: CSBMatrix) -> list[Tensor]:
        return [w.values, w.codes, w.blk_ptr, w.blk_pad, w.units]

    def with_arrays(self, w: CSBMatrix, arrays: Sequence[Tensor]) -> CSBMatrix:
        return CSBMatrix(*arrays, m=w.m, k=w.k, layout=w.layout)

    def multiply(self, w: CSBMatrix, direction: str, layout: str, x: Tensor | None, y: Tensor | None) -> Tensor:
        dim = -1 if layout == "last" else 0
        if direction == "F":
            return ops.spmm(w, x, dim=dim)
        if direction == "T":
            return ops.spmm_t(w, y, dim=dim)
        return ops.sddmm(w, y, x, dim=dim)

    def unpack(self, w: CSBMatrix, direction: str) -> Tensor:
        return w.to_dense()

    def sampled(self, w: CSBMatrix, result: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = reference.decode(w)
        return result[at.index], at.row, at.col

    def nonzeros(self, w: CSBMatrix) -> int:
        return w.nnz


class TorchCSR(Implementation):
    """cuSPARSE or MKL through torch. ``csr.t() @ Y`` is what a user has: torch converts it on every call."""

    name = "torch_csr"

    def pack(self, dense: Tensor, direction: str) -> Tensor:
        csr = baselines.CSRMatrix.from_dense(dense)
        return torch.sparse_csr_tensor(
            csr.row_ptr, csr.col_ind, csr.values, size=dense.shape, check_invariants=False, requires_grad=False
        )

    def arrays(self, w: Tensor) -> list[Tensor]:
        return [w.crow_indices(), w.col_indices(), w.values()]

    def with_arrays(self, w: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        return torch.sparse_csr_tensor(*arrays, size=w.shape, check_invariants=False)

    def multiply(self, w: Tensor, direction: str, layout: str, x: Tensor | None, y: Tensor | None) -> Tensor:
        if direction == "dW":
            if layout == "last":
                return torch.sparse.sampled_addmm(w, y.t(), x, beta=0.0)
            return torch.sparse.sampled_addmm(w, y, x.t(), beta=0.0)
        matrix, operand = (w, x) if direction == "F" else (w.t(), y)
        if layout == "first":
            return matrix @ operand
        # One column is also a vector, for which the library has a routine of its own.
        if len(operand) != 1:
            raise NotImplementedError("torch's CSR multiplies features first")
        return (matrix @ operand[0])[None]

    def unpack(self, w: Tensor, direction: str) -> Tensor:
        return w.to_dense()

    def sampled(self, w: Tensor, result: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row_ptr = result.crow_indices().long()
        row = torch.repeat_interleave(torch.arange(len(row_ptr) - 1, device=row_ptr.device), row_ptr.diff())
        return result.values(), row, result.col_indices().long()

    def nonzeros(self, w: Tensor) -> int:
        return w.values().numel()


class CSRBaseline(Implementation):
    """A kernel of ``torch_csb.baselines``. T multiplies by a second, transposed copy, which is made beforehand."""

    layouts = ("first",)

    def __init__(
        self, name: str, product: Callable[[baselines.CSRMatrix, Tensor], Tensor], cuda_only: bool = False
    ) -> None:
        self.name = name
        self._product = product
        self._cuda_only = cuda_only

    def pack(self, dense: Tensor, direction: str) -> baselines.CSRMatrix:
        w = baselines.CSRMatrix.from_dense(dense)
        return w.t() if direction == "T" else w

    def arrays(self, w: baselines.CSRMatrix) -> list[Tensor]:
        return list(w.arrays())

    def with_arrays(self, w: baselines.CSRMatrix, arrays: Sequence[Tensor]) -> baselines.CSRMatrix:
        return w.with_arrays(*arrays)

    def multiply(self, w: Any, direction: str, layout: str, x: Tensor | None, y: Tensor | None) -> Tensor:
        if direction == "dW" or (self._cuda_only and w.device.type != "cuda"):
            raise NotImplementedError(f"{self.name} is a product, and of CUDA tensors where it has no other kernel")
        return self._product(w, x if direction == "F" else y)

    def unpack(self, w: baselines.CSRMatrix, direction: str) -> Tensor:
        dense = w.to_dense()
        return dense.t() if direction == "T" else dense

    def nonzeros(self, w: baselines.CSRMatrix) -> int:
        return w.nnz


class CSRSddmm(CSRBaseline):
    def __init__(self) -> None:
        self.name = "csr_sddmm"

    def multiply(self, w: Any, direction: str, layout: str, x: Tensor | None, y: Tensor | None) -> Tensor:
        if direction != "dW":
            raise NotImplementedError("csr_sddmm computes dW")
        return baselines.sddmm(w, y, x)

    def sampled(self, w: baselines.CSRMatrix, result: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = torch.repeat_interleave(torch.arange(w.m, device=result.device), w.row_ptr.long().diff())
        return result, row, w.col_ind.long()


IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        CSB(),
        Dense(),
        DenseTF32(),
        TorchCSR(),
        CSRBaseline("csr_row_split", baselines.row_split),
        CSRBaseline("csr_merge", baselines.merge, cuda_only=True),
        CSRBaseline("csr_row_swizzle", baselines.row_swizzle, cuda_only=True),
        CSRSddmm(),
    )
}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@functools.cache
def layouts_offered(name: str, direction: str, dtype: torch.dtype, device: str, n: int) -> tuple[str, ...]:
    """The layouts in which an implementation has a direction here, found out on a tiny product.

    Whether n is 1 matters, nothing else of it.
    """
    if n > 2:
        return layouts_offered(name, direction, dtype, device, 2)
    implementation, offered = IMPLEMENTATIONS[name], []
    dense = torch.eye(8, device=device, dtype=dtype)
    for layout in implementation.layouts:
        x = torch.ones((n, 8) if layout == "last" else (8, n), device=device, dtype=dtype)
        try:
            implementation.multiply(implementation.pack(dense, direction), direction, layout, x, x)
        except NotImplementedError:
            continue
        except RuntimeError:
            if name != "torch_csr":  # which knows fewer dtypes; a kernel of ours that fails must be seen
                raise
            continue
        offered.append(layout)
    return tuple(offered)


def replicate(arrays: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """``count`` copies of a list of tensors; the first are the tensors themselves."""
    copies = [[] for _ in range(count)]
    for array in arrays:
        # One allocation for all copies. Each starts at a multiple of 256 bytes, as a tensor of its own would.
        step = -(-max(array.nbytes, 1) // 256) * 256 // array.element_size()
        memory = torch.empty(count - 1, step, dtype=array.dtype, device=array.device)
        memory[:, : array.numel()] = array.reshape(-1)
        copies[0].append(array)
        for others, row in zip(copies[1:], memory, strict=True):
            others.append(row[: array.numel()].view(array.shape))
    return copies
