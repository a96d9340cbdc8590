"""Products in Compressed Sparse Rows, to compare the Compressed Sparse Blocks with. Nothing of the package uses them.

| function              | product                  | algorithm                                            | runs on   |
|-----------------------|--------------------------|------------------------------------------------------|-----------|
| ``row_split(w, x)``   | Y = W.X                  | a group of threads for each row                      | CPU, CUDA |
| ``merge(w, x)``       | Y = W.X                  | equal shares of the entries, cut rows are joined     | CUDA      |
| ``row_swizzle(w, x)`` | Y = W.X                  | one-dimensional tiles, rows of like length together  | CUDA      |
| ``sddmm(w, a, b)``    | V = A.B^T at W's entries | a dot product for each entry                         | CPU, CUDA |

Dense matrices stand features first and without gaps, as the papers have them: X is ``[k, n]`` and Y is ``[m, n]``.
None of the functions has a derivative.
"""

from __future__ import annotations

import copy

import torch

from torch_csb import convert
from torch_csb.matrix import CSBMatrix
from torch_csb.validate import INT32_MAX, VALUE_DTYPES

_ops = torch.ops.torch_csb


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class CSRMatrix:
    """A matrix W (m x k) in Compressed Sparse Rows.

    Row i holds the entries ``row_ptr[i]`` to ``row_ptr[i + 1] - 1``, in ascending order of columns.

    Args:
        values: ``[nnz]``, float64, float32, bfloat16 or float16.
        row_ptr: int32 ``[m + 1]``.
        col_ind: int32 ``[nnz]``.
        row_order: int32 ``[m]``, every row once, longest first; by default equally long rows stand in their own order.
        m, k: the sizes, which are also attributes.

    Raises:
        ValueError: the arrays are no such matrix; the message names the array and what is wrong with it.
    """

    def __init__(
        self,
        values: torch.Tensor,
        row_ptr: torch.Tensor,
        col_ind: torch.Tensor,
        row_order: torch.Tensor | None = None,
        *,
        m: int,
        k: int,
    ) -> None:
        _check_entries(values, row_ptr, col_ind, m, k)
        if row_order is None:
            row_order = row_ptr.diff().argsort(descending=True, stable=True).to(torch.int32)
        _check_order(row_order, row_ptr)
        self.values = values
        self.row_ptr = row_ptr
        self.col_ind = col_ind
        self.row_order = row_order
        self.m = m
        self.k = k

    @staticmethod
    def from_dense(dense: torch.Tensor) -> CSRMatrix:
        """Keeps the elements of a matrix ``[m, k]`` that compare unequal to zero (NaN does)."""
        _require(dense.dim() == 2, f"dense: expected a matrix, got shape {tuple(dense.shape)}")
        dense = dense.detach()
        row, col = (dense != 0).nonzero(as_tuple=True)
        return _from_sorted(row, col, dense[row, col], *dense.shape)

    @staticmethod
    def from_csb(w: CSBMatrix) -> CSRMatrix:
        """The same matrix (of a transposed view: the transpose), explicit zeros too, padding left out."""
        row, col = convert.coordinates(w)
        if w.transposed:
            row, col = col, row
        m, k = w.shape
        order = (row * k + col).argsort()
        return _from_sorted(row[order], col[order], w.values.detach()[w.is_entry][order], m, k)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.m, self.k))

    @property
    def nnz(self) -> int:
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of every array, the order of the rows included."""
        return sum(array.nbytes for array in self.arrays())

    def to_dense(self) -> torch.Tensor:
        """The dense matrix ``[m, k]``."""
        dense = self.values.new_zeros(self.m, self.k)
        dense[_rows(self.row_ptr), self.col_ind.long()] = self.values.detach()
        return dense

    def t(self) -> CSRMatrix:
        """The transpose: a second matrix with arrays of its own, because CSR has no cheap transpose."""
        order = self.col_ind.argsort(stable=True)
        row, col = _rows(self.row_ptr)[order], self.col_ind[order]
        return _from_sorted(col, row, self.values.detach()[order], self.k, self.m)

    def arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(values, row_ptr, col_ind, row_order)"""
        return self.values, self.row_ptr, self.col_ind, self.row_order

    def with_arrays(
        self, values: torch.Tensor, row_ptr: torch.Tensor, col_ind: torch.Tensor, row_order: torch.Tensor
    ) -> CSRMatrix:
        """The same matrix on copies of its arrays, which are trusted to be that."""
        other = copy.copy(self)
        other.values, other.row_ptr, other.col_ind, other.row_order = values, row_ptr, col_ind, row_order
        return other

    def clone(self) -> CSRMatrix:
        """The same matrix in memory of its own."""
        return self.with_arrays(*(array.detach().clone() for array in self.arrays()))

    def to(self, device: torch.device | str) -> CSRMatrix:
        return self.with_arrays(*(array.to(device) for array in self.arrays()))

    def __repr__(self) -> str:
        return f"CSRMatrix({self.m}x{self.k}, nnz={self.nnz}, dtype={self.dtype}, device={self.device})"


def _rows(row_ptr: torch.Tensor) -> torch.Tensor:
    """int64 ``[nnz]``: the row of each entry."""
    return torch.repeat_interleave(torch.arange(len(row_ptr) - 1, device=row_ptr.device), row_ptr.diff())


def _from_sorted(row: torch.Tensor, col: torch.Tensor, values: torch.Tensor, m: int, k: int) -> CSRMatrix:
    """From entries by row, then by column."""
    _require(len(values) <= INT32_MAX, f"expected at most 2^31 - 1 entries, got {len(values)}; split the matrix")
    ends = torch.bincount(row, minlength=m).cumsum(0)
    row_ptr = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return CSRMatrix(values, row_ptr, col.to(torch.int32), m=m, k=k)


def _vector(tensor: torch.Tensor, name: str, length: int, device: torch.device) -> None:
    _require(tensor.device == device, f"{name}: expected a tensor on {device} like values, got one on {tensor.device}")
    _require(tensor.dtype == torch.int32, f"{name}: expected dtype int32, got {tensor.dtype}")
    _require(
        tensor.shape == (length,) and tensor.is_contiguous(),
        f"{name}: expected {length} contiguous elements, got shape {tuple(tensor.shape)}",
    )


def _check_entries(values: torch.Tensor, row_ptr: torch.Tensor, col_ind: torch.Tensor, m: int, k: int) -> None:
    _require(
        values.dtype in VALUE_DTYPES,
        f"values: expected dtype float64, float32, bfloat16 or float16, got {values.dtype}",
    )
    _require(
        values.dim() == 1 and values.is_contiguous(),
        f"values: expected a contiguous 1-D tensor, got shape {tuple(values.shape)}",
    )
    nnz = len(values)
    for name, size in (("m", m), ("k", k), ("values", nnz)):
        _require(0 <= size <= INT32_MAX, f"{name}: expected a size from 0 to 2^31 - 1, got {size}")
    _vector(row_ptr, "row_ptr", m + 1, values.device)
    _vector(col_ind, "col_ind", nnz, values.device)
    first, last = row_ptr[[0, -1]].tolist()
    _require((first, last) == (0, nnz), f"row_ptr: expected to run from 0 to {nnz}, got {first} to {last}")
    # Differences in 64 bits: in 32 a fall from a large number could wrap around and pass.
    falls = row_ptr.long().diff() < 0
    if bool(falls.any()):
        raise ValueError(f"row_ptr: expected a monotone prefix, it falls after row {int(falls.int().argmax())}")
    if nnz == 0:
        return
    low, high = int(col_ind.min()), int(col_ind.max())
    _require(low >= 0 and high < k, f"col_ind: expected columns from 0 to {k - 1}, got {low} to {high}")
    row = _rows(row_ptr)
    disorder = (row[1:] == row[:-1]) & (col_ind[1:] <= col_ind[:-1])
    if bool(disorder.any()):
        e = int(disorder.int().argmax()) + 1
        before, here = col_ind[e - 1 : e + 1].tolist()
        raise ValueError(
            f"col_ind: expected ascending columns, got {here} after {before} at entry {e} of row {int(row[e])}"
        )


def _check_order(row_order: torch.Tensor, row_ptr: torch.Tensor) -> None:
    m = len(row_ptr) - 1
    _vector(row_order, "row_order", m, row_ptr.device)
    rows = torch.arange(m, dtype=torch.int32, device=row_ptr.device)
    _require(torch.equal(row_order.sort().values, rows), "row_order: expected every row once")
    lengths = row_ptr.diff()[row_order.long()]
    _require(not bool((lengths.diff() > 0).any()), "row_order: expected the longest rows first")


def _refuse_grad(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("the baselines have no derivative: detach() what requires grad, or use torch.no_grad()")


def _multiply(name: str, w: CSRMatrix, x: torch.Tensor) -> torch.Tensor:
    _refuse_grad(w.values, x)
    # The operator takes the number of columns of W from x.
    _require(x.dim() == 2 and x.shape[0] == w.k, f"x: expected shape [{w.k}, n], got {list(x.shape)}")
    return getattr(_ops, name)(w.values, w.row_ptr, w.col_ind, w.row_order, x)


def _require_cuda(name: str, w: CSRMatrix) -> None:
    if w.device.type != "cuda":
        raise RuntimeError(f"{name}: expected a matrix on CUDA, got one on {w.device}; row_split runs on CPUs too")


def row_split(w: CSRMatrix, x: torch.Tensor) -> torch.Tensor:
    """Y = W.X, a group of threads for each row of W.

    Args:
        w: m x k.
        x: ``[k, n]``, contiguous, dtype and device of ``w``.

    Returns:
        ``[m, n]``, contiguous. 16-bit products are accumulated in float32. The same inputs give the same bits on every
        run.

    Raises:
        ValueError: x does not have k rows.
        RuntimeError: dtype, device or layout do not fit, or an input requires grad while grad mode is on.

    Like ``w.to_dense() @ x``.

    Source: Yang, Buluc, Owens, "Design principles for sparse matrix multiplication on the GPU", Euro-Par 2018.
    """
    return _multiply("csr_row_split", w, x)


def merge(w: CSRMatrix, x: torch.Tensor) -> torch.Tensor:
    """Y = W.X, an equal share of W's entries for each group of threads; the sums of cut rows are joined in fixed order.

    CUDA only. Arguments, result and errors are those of :func:`row_split`, and a matrix on a CPU is a RuntimeError.

    Source: Yang, Buluc, Owens, "Design principles for sparse matrix multiplication on the GPU", Euro-Par 2018; after
    Merrill and Garland, "Merge-based parallel sparse matrix-vector multiplication", SC 2016.
    """
    _require_cuda("merge", w)
    return _multiply("csr_merge", w, x)


def row_swizzle(w: CSRMatrix, x: torch.Tensor) -> torch.Tensor:
    """Y = W.X in one-dimensional tiles, rows taken longest first, so that groups which run side by side end together.

    CUDA only. Arguments, result and errors are those of :func:`row_split`, and a matrix on a CPU is a RuntimeError.

    Source: Gale, Zaharia, Young, Elsen, "Sparse GPU kernels for deep learning", SC 2020.
    """
    _require_cuda("row_swizzle", w)
    return _multiply("csr_row_swizzle", w, x)


def sddmm(w: CSRMatrix, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """V[e] = sum_j A[row(e), j] * B[col(e), j] for every entry e of W: A.B^T sampled at W's pattern.

    Args:
        w: m x k; only its pattern is used.
        a: ``[m, n]``, contiguous.
        b: ``[k, n]``, contiguous, dtype of ``a``; both on the device of ``w``.

    Returns:
        ``[nnz]`` in the order of ``w.values``. 16-bit products are accumulated in float32.

    Raises:
        ValueError: b does not have k rows.
        RuntimeError: dtype, device, layout or shape do not fit, or an input requires grad while grad mode is on.

    Source: Gale, Zaharia, Young, Elsen, "Sparse GPU kernels for deep learning", SC 2020.
    """
    _refuse_grad(a, b)
    _require(b.dim() == 2 and b.shape[0] == w.k, f"b: expected shape [{w.k}, n], got {list(b.shape)}")
    return _ops.csr_sddmm(w.row_ptr, w.col_ind, w.row_order, a, b)
