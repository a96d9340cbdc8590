"""CSBMatrix: a sparse matrix in Compressed Sparse Blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torch_csb import convert
from torch_csb.layout import Layout
from torch_csb.validate import validate_arrays

if TYPE_CHECKING:
    import scipy.sparse


class CSBMatrix:
    """A matrix W (m x k) in Compressed Sparse Blocks, or, after :meth:`t`, its transpose.

    W is cut into ``block_size`` x ``block_size`` blocks. The blocks' entries stand one after the
    other, each with a value; where they stand inside the block a 16-bit code tells each of them, or a
    bitmap all of them. ``blk_ptr`` is the prefix of the blocks' sizes. docs/format.md holds the
    numbered contract.

    The constructor takes trusted tensors as they are. Use :meth:`from_dense`, :meth:`from_csr`,
    :meth:`from_coo`, :meth:`from_scipy`, or :meth:`from_arrays` for arrays of unknown origin.

    Attributes:
        values: ``[stored]``, float64, float32, bfloat16 or float16; padding entries included.
        codes: uint8 ``[2 * stored]``, little-endian 16-bit codes, or, by the layout's encoding, int64
            ``[mb * kb * 64]``, a bitmap of 4096 bits for each block.
        blk_ptr: int32 ``[mb * kb + 1]``; ``mb = ceil(m / block_size)``, ``kb = ceil(k / block_size)``.
        blk_pad: uint8 ``[mb * kb]``, padding entries at the end of each block.
        units: int32 ``[2, num_units + 1]``, the plan: first block of each work unit, in row-major
            and in column-major block order.
        layout: block size, entry order with the encoding, and alignment.

    Source: Buluc, Fineman, Frigo, Gilbert, Leiserson, "Parallel sparse matrix-vector and
    matrix-transpose-vector multiplication using compressed sparse blocks", SPAA 2009.
    """

    def __init__(
        self,
        values: torch.Tensor,
        codes: torch.Tensor,
        blk_ptr: torch.Tensor,
        blk_pad: torch.Tensor,
        units: torch.Tensor,
        *,
        m: int,
        k: int,
        layout: Layout,
        transposed: bool = False,
    ) -> None:
        self.values = values
        self.codes = codes
        self.blk_ptr = blk_ptr
        self.blk_pad = blk_pad
        self.units = units
        self.m = m
        self.k = k
        self.layout = layout
        self.transposed = transposed

    @staticmethod
    def from_dense(
        w: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        block_size: int | None = None,
        target: str = "auto",
        encoding: str | None = None,
    ) -> CSBMatrix:
        """Packs a dense matrix.

        Args:
            w: ``[m, k]``, any strides, on CPU or CUDA.
            mask: bool ``[m, k]``; its True elements are stored, zeros among them too. Without it
                the elements that compare unequal to zero are stored (NaN is).
            block_size: a power of two from 2 to 256; default by ``target`` and device.
            target: ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA where torch has it), where the matrix will run.
            encoding: ``"codes"``, or ``"bitmap"`` in blocks of 64; default by target, dtype and density.

        Raises:
            ValueError: ``target``, ``block_size`` or ``encoding`` is not one of the above.
            RuntimeError: wrong dtype, device or shape.
        """
        return CSBMatrix(**convert.pack_dense(w, mask, convert.choose_layout(block_size, target, encoding)))

    @staticmethod
    def from_coo(
        w: torch.Tensor, *, block_size: int | None = None, target: str = "auto", encoding: str | None = None
    ) -> CSBMatrix:
        """Packs a ``torch.sparse_coo`` matrix; duplicate coordinates are added up, explicit zeros stay."""
        return CSBMatrix(**convert.pack_coo(w, convert.choose_layout(block_size, target, encoding)))

    @staticmethod
    def from_csr(
        w: torch.Tensor, *, block_size: int | None = None, target: str = "auto", encoding: str | None = None
    ) -> CSBMatrix:
        """Packs a ``torch.sparse_csr`` matrix; explicit zeros stay entries."""
        return CSBMatrix(**convert.pack_csr(w, convert.choose_layout(block_size, target, encoding)))

    @staticmethod
    def from_scipy(
        w: scipy.sparse.spmatrix | scipy.sparse.sparray,
        *,
        block_size: int | None = None,
        target: str = "auto",
        encoding: str | None = None,
    ) -> CSBMatrix:
        """Packs any SciPy sparse matrix; duplicates are added up, explicit zeros stay entries."""
        return CSBMatrix(**convert.pack_scipy(w, convert.choose_layout(block_size, target, encoding)))

    @staticmethod
    def from_arrays(
        values: torch.Tensor,
        codes: torch.Tensor,
        blk_ptr: torch.Tensor,
        blk_pad: torch.Tensor,
        *,
        m: int,
        k: int,
        layout: Layout,
    ) -> CSBMatrix:
        """The door for arrays of unknown origin: validates them, then plans.

        Raises:
            ValueError: ``"invariant N: ..."``, naming the array and what is wrong with it.
        """
        validate_arrays(values, codes, blk_ptr, blk_pad, m=m, k=k, layout=layout)
        units = convert.plan(blk_ptr, blk_pad, m, k, layout.block_size)
        return CSBMatrix(values, codes, blk_ptr, blk_pad, units, m=m, k=k, layout=layout)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.k, self.m) if self.transposed else (self.m, self.k))

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nnz(self) -> int:
        """Stored entries without padding."""
        return self.values.numel() - int(self.blk_pad.sum(dtype=torch.int64))

    @property
    def sparsity(self) -> float:
        """1 - nnz / (m * k); 0 for a matrix without elements."""
        elements = self.m * self.k
        return 1.0 - self.nnz / elements if elements else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of every array, the plan included."""
        arrays = (self.values, self.codes, self.blk_ptr, self.blk_pad, self.units)
        return sum(array.numel() * array.element_size() for array in arrays)

    @property
    def is_entry(self) -> torch.Tensor:
        """bool ``[stored]``: True at entries, False at padding."""
        return convert.is_entry(self.blk_ptr, self.blk_pad)

    @property
    def row_ind(self) -> torch.Tensor:
        """int32 ``[nnz]``: row of each entry inside its block, in entry order, padding left out."""
        return convert.local_coordinates(self)[0]

    @property
    def col_ind(self) -> torch.Tensor:
        """int32 ``[nnz]``: column of each entry inside its block, in entry order, padding left out."""
        return convert.local_coordinates(self)[1]

    def t(self) -> CSBMatrix:
        """The transpose: a view of the same arrays, without a pass over them."""
        return CSBMatrix(
            self.values,
            self.codes,
            self.blk_ptr,
            self.blk_pad,
            self.units,
            m=self.m,
            k=self.k,
            layout=self.layout,
            transposed=not self.transposed,
        )

    @property
    def T(self) -> CSBMatrix:  # noqa: N802
        return self.t()

    def with_values(self, values: torch.Tensor) -> CSBMatrix:
        """The same pattern with other values ``[stored]``."""
        if values.shape != self.values.shape:
            raise ValueError(f"values: expected shape {tuple(self.values.shape)}, got {tuple(values.shape)}")
        return CSBMatrix(
            values,
            self.codes,
            self.blk_ptr,
            self.blk_pad,
            self.units,
            m=self.m,
            k=self.k,
            layout=self.layout,
            transposed=self.transposed,
        )

    def to(self, *args, **kwargs) -> CSBMatrix:
        """Moves like :meth:`torch.Tensor.to`; a dtype applies to the values, a device to every array."""
        values = self.values.to(*args, **kwargs)
        device = values.device
        return CSBMatrix(
            values,
            self.codes.to(device),
            self.blk_ptr.to(device),
            self.blk_pad.to(device),
            self.units.to(device),
            m=self.m,
            k=self.k,
            layout=self.layout,
            transposed=self.transposed,
        )

    def validate(self) -> None:
        """Walks the numbered contract of docs/format.md.

        Raises:
            ValueError: ``"invariant N: ..."`` for the first one that does not hold.
        """
        validate_arrays(
            self.values, self.codes, self.blk_ptr, self.blk_pad, m=self.m, k=self.k, layout=self.layout, strict=True
        )

    def to_dense(self) -> torch.Tensor:
        """The dense matrix, ``self.shape``, contiguous (a transposed view for a transposed matrix)."""
        dense = convert.unpack_dense(self)
        return dense.t() if self.transposed else dense

    def to_coo(self) -> torch.Tensor:
        """A coalesced ``torch.sparse_coo`` matrix with every entry, explicit zeros too."""
        return convert.unpack_coo(self)

    def to_csr(self) -> torch.Tensor:
        """A ``torch.sparse_csr`` matrix with every entry, explicit zeros too; int64 indices."""
        return convert.unpack_coo(self).to_sparse_csr()

    def to_scipy(self) -> scipy.sparse.csr_array:
        """A ``scipy.sparse.csr_array`` on the host; 16-bit values become float32, which SciPy has."""
        return convert.unpack_scipy(self)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        """``W @ x`` for x of shape ``[k]`` or ``[k, n]``, differentiable in values and x."""
        from torch_csb import ops

        if x.dim() not in (1, 2):
            raise ValueError(f"x: expected a vector or a matrix, got shape {tuple(x.shape)}")
        return ops.spmm(self, x, dim=0)

    def __repr__(self) -> str:
        return (
            f"CSBMatrix({self.shape[0]}x{self.shape[1]}, nnz={self.nnz}, sparsity={self.sparsity:.4f}, "
            f"block_size={self.block_size}, order={self.layout.order}, dtype={self.dtype}, device={self.device}"
            + (", transposed" if self.transposed else "")
            + ")"
        )
