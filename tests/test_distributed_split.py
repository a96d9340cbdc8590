"""A matrix in parts, without any process group."""

from __future__ import annotations

import pytest
import torch
from cases import random_matrix

from torch_csb.distributed import (
    join_matrices,
    split_matrix,
)

ARRAYS = ("values", "codes", "blk_ptr", "blk_pad", "units")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("block_size", [8, 16, 64, "bitmap"])
@pytest.mark.parametrize(("m", "k", "parts"), [(50, 70, 2), (50, 70, 3), (64, 64, 4), (3, 2, 5), (0, 9, 2), (7, 0, 2)])
def test_parts_are_the_chunks_of_the_dense_matrix_and_join_to_the_bit(device, dim, block_size, m, k, parts):
    w = random_matrix(m, k, 0.7, device=device, block_size=block_size)
    if w.nnz:
        w.values[0] = 0  # an entry all the same
    found = split_matrix(w, parts, dim)
    step = -(-(m, k)[dim] // parts)
    assert len(found) == parts and sum(part.nnz for part in found) == w.nnz
    for index, part in enumerate(found):
        part.validate()
        expected = w.to_dense().narrow(dim, start := min(index * step, (m, k)[dim]), min(step, (m, k)[dim] - start))
        assert torch.equal(part.to_dense(), expected) and part.layout == w.layout
    joined = join_matrices(found, dim)
    for name in ARRAYS:
        assert torch.equal(getattr(joined, name), getattr(w, name)), name


def test_splitting_refuses():
    w = random_matrix(20, 30, 0.5)
    for arguments, message in (((w.t(), 2, 0), "transposed"), ((w, 0, 0), "parts: .*got 0"), ((w, 2, -1), "dim: .*-1")):
        with pytest.raises(ValueError, match=message):
            split_matrix(*arguments)
    for arguments, message in (
        (([], 0), "got none"),
        (([w, w.t()], 0), "transposed"),
        (([w, random_matrix(20, 31, 0.5)], 0), "expected 30 columns, got 31"),
        (([w, random_matrix(21, 30, 0.5)], 1), "expected 20 rows, got 21"),
    ):
        with pytest.raises(ValueError, match=message):
            join_matrices(*arguments)
