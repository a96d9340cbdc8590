"""One weight as sections: values as codes into a codebook, coordinates as gaps in row-major order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix
from torch_csb.prune._sections import Sections, is_size

_VALUE_DTYPES = ("float64", "float32", "float16", "bfloat16")
_OTHER_DTYPES = ("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128")
DTYPES = {name: getattr(torch, name) for name in _VALUE_DTYPES + _OTHER_DTYPES}
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_MAX_CODEBOOK = 256
# This gap in a byte stands for one that is listed apart.
_FAR = 255


def encode(matrix: CSBMatrix) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header's record of a weight, and its sections."""
    matrix = matrix.to("cpu")
    values = matrix.values.detach()
    # Entry numbers in place of values: coalescing moves them without touching a bit of a NaN or of -0.
    numbered = matrix.with_values(torch.arange(len(values), dtype=torch.float64)).to_coo()
    row, col = numbered.indices()
    values = values[numbered.values().long()]
    gaps = (row * matrix.k + col).diff(prepend=torch.tensor([-1])) - 1
    distinct, codes = values.view(_BITS[values.element_size()]).unique(return_inverse=True)
    shared = len(distinct) <= _MAX_CODEBOOK and nbytes(distinct) + len(values) < nbytes(values)
    record = {
        "size": [matrix.m, matrix.k],
        "layout": matrix.layout.to_tensor().tolist(),
        "dtype": name_of(values.dtype),
        "nnz": len(values),
        "codebook": len(distinct) if shared else 0,
    }
    parts = {
        "gaps": to_bytes(gaps.clamp(max=_FAR).to(torch.uint8)),
        "far gaps": to_bytes(gaps[gaps >= _FAR].to(_far_dtype(matrix.m, matrix.k))),
        "values": to_bytes(codes.to(torch.uint8) if shared else values),
    }
    if shared:
        parts["codebook"] = to_bytes(distinct)
    return record, parts


def decode(name: str, record: object, sections: Sections, m: int, k: int) -> CSBMatrix:
    """The weight of a layer that is m × k in the model, whatever the file says.

    Raises:
        ValueError: naming the section or the header's field, and what is wrong with it.
    """
    where = f"header: layer {name!r}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    if record.get("size") != [m, k]:
        raise ValueError(f"{where}: expected the model's size [{m}, {k}], got {record.get('size')!r:.80}")
    nnz, count, dtype = record.get("nnz"), record.get("codebook"), record.get("dtype")
    if not is_size(nnz) or nnz > m * k:
        raise ValueError(f"{where}: nnz: expected at most {m * k} entries, got {nnz!r:.80}")
    if not is_size(count) or count > _MAX_CODEBOOK:
        raise ValueError(f"{where}: codebook: expected at most {_MAX_CODEBOOK} values, got {count!r:.80}")
    if dtype not in _VALUE_DTYPES:
        raise ValueError(f"{where}: dtype: expected {', '.join(_VALUE_DTYPES)}, got {dtype!r:.80}")
    layout = record.get("layout")
    if not isinstance(layout, list) or not all(is_size(n) and n < 2**31 for n in layout):
        raise ValueError(f"{where}: layout: expected four sizes, got {layout!r:.80}")
    try:
        layout = Layout.from_tensor(torch.tensor(layout, dtype=torch.int32))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    row, col = _coordinates(name, nnz, sections, m, k)
    part, kind = section(name, "values"), DTYPES[dtype]
    if count:
        codes = from_bytes(sections.take(part, nnz), torch.uint8).int()
        if nnz and int(codes.max()) >= count:
            raise ValueError(f"section {part!r}: expected codes below {count}, got {int(codes.max())}")
        values = from_bytes(sections.take(section(name, "codebook"), count * kind.itemsize), kind)[codes]
    else:
        values = from_bytes(sections.take(part, nnz * kind.itemsize), kind)
    entries = torch.sparse_coo_tensor(torch.stack((row, col)), values, (m, k), is_coalesced=True, check_invariants=True)
    return CSBMatrix.from_coo(entries, block_size=layout.block_size, encoding=layout.encoding)


def _coordinates(name: str, nnz: int, sections: Sections, m: int, k: int) -> tuple[Tensor, Tensor]:
    """int64 (row, col) in row-major order, inside m × k and distinct."""
    gaps = from_bytes(sections.take(section(name, "gaps"), nnz), torch.uint8).long()
    far, dtype, part = gaps == _FAR, _far_dtype(m, k), section(name, "far gaps")
    distances = from_bytes(sections.take(part, int(far.sum()) * dtype.itemsize), dtype).long()
    if len(distances) and not _FAR <= int(distances.min()) <= int(distances.max()) < m * k:
        raise ValueError(f"section {part!r}: expected gaps from {_FAR} to {m * k - 1}")
    gaps[far] = distances
    place = (gaps + 1).cumsum(0) - 1
    # Each gap is below m·k < 2^62, so a sum that ran over would turn negative somewhere.
    if nnz and (int(place.min()) < 0 or int(place.max()) >= m * k):
        raise ValueError(f"section {section(name, 'gaps')!r}: the gaps lead outside the {m} x {k} matrix")
    return torch.div(place, max(k, 1), rounding_mode="floor"), place % max(k, 1)


def _far_dtype(m: int, k: int) -> torch.dtype:
    return torch.int32 if m * k < 2**31 else torch.int64


def section(name: str, part: str) -> str:
    return f"layer {name}: {part}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def to_bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
