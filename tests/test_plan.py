"""Work units: every entry exactly once in either direction, and as even as whole blocks allow."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from cases import BLOCK_SIZES, build, random_matrix
from torch import Tensor

from torch_csb import CSBMatrix, reference
from torch_csb.testing import MATRICES, NamedMatrix

FORWARD, TRANSPOSED = 0, 1


def block_order(w: CSBMatrix, direction: int) -> list[int]:
    """Block numbers in the order in which a direction walks them."""
    mb, kb = -(-w.m // w.block_size), -(-w.k // w.block_size)
    if direction == FORWARD:
        return list(range(mb * kb))
    return [i * kb + j for j in range(kb) for i in range(mb)]


def block_nonzeros(w: CSBMatrix, direction: int) -> list[int]:
    count = (w.blk_ptr.diff().long() - w.blk_pad.long()).tolist()
    return [count[block] for block in block_order(w, direction)]


def visits(w: CSBMatrix, units: Tensor, direction: int) -> Tensor:
    """How often the units of a direction touch each element of W."""
    ptr, pad, order = w.blk_ptr.tolist(), w.blk_pad.tolist(), block_order(w, direction)
    begin = units[direction].tolist()
    touched = torch.zeros(w.values.numel(), dtype=torch.int64)
    for first, last in zip(begin, begin[1:], strict=False):
        for position in range(first, last):
            block = order[position]
            touched[ptr[block] : ptr[block + 1] - pad[block]] += 1
    return touched


def check_coverage(w: CSBMatrix, units: Tensor) -> None:
    blocks = w.blk_pad.numel()
    assert units.dtype == torch.int32 and units.shape[0] == 2 and units.shape[1] >= 2
    entries = reference.decode(w).index
    once = torch.zeros(w.values.numel(), dtype=torch.int64)
    once[entries] = 1
    for direction in (FORWARD, TRANSPOSED):
        begin = units[direction].tolist()
        assert begin[0] == 0 and begin[-1] == blocks, f"direction {direction}: units walk {begin[0]} to {begin[-1]}"
        assert begin == sorted(begin), f"direction {direction}: units overlap"
        assert torch.equal(visits(w, units, direction), once), f"direction {direction}: an entry is not covered once"


def lightest_heaviest(nonzeros: list[int], num_units: int) -> int:
    """The heaviest unit of the most even cut of a walk into num_units runs of whole blocks."""
    prefix = [0, *accumulate(nonzeros)]

    def fits(capacity: int) -> bool:
        at = 0
        for _ in range(num_units):
            at = bisect_right(prefix, prefix[at] + capacity, lo=at) - 1
        return at == len(nonzeros)

    low, high = max(nonzeros, default=0), prefix[-1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def check_balance(w: CSBMatrix, units: Tensor) -> None:
    """max / mean <= 1.1 wherever some cut into as many runs of whole blocks has it; elsewhere (blocks that outweigh a
    unit's share) at most 1.1 times the heaviest unit of the most even such cut."""
    num_units = units.shape[1] - 1
    for direction in (FORWARD, TRANSPOSED):
        nonzeros = block_nonzeros(w, direction)
        begin = units[direction].tolist()
        heaviest = max(sum(nonzeros[first:last]) for first, last in zip(begin, begin[1:], strict=False))
        mean = sum(nonzeros) / num_units
        best = lightest_heaviest(nonzeros, num_units)
        limit = 1.1 * mean if best <= 1.1 * mean else 1.1 * best
        assert heaviest <= limit, f"direction {direction}: {heaviest} nonzeros, mean {mean:.1f}, best cut {best}"


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_units_cover_every_entry_once_and_evenly(case: NamedMatrix, block_size: int) -> None:
    w = build(case, block_size=block_size)
    check_coverage(w, w.units)
    check_balance(w, w.units)


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_a_large_matrix_feeds_a_large_chip(sparsity: float, block_size: int) -> None:
    """A planner that makes one unit is perfectly even, and useless: an H200 has 132 multiprocessors."""
    w = random_matrix(3072, 4096, sparsity, block_size=block_size)
    check_balance(w, w.units)
    blocks, units = w.blk_pad.numel(), w.units.shape[1] - 1
    assert units >= min(132, blocks // 5, w.nnz // 4096)


def test_the_plan_is_a_function_of_the_pattern() -> None:
    w = random_matrix(700, 900, 0.8)
    mb, kb = -(-w.m // w.block_size), -(-w.k // w.block_size)
    again = torch.ops.torch_csb.plan(w.blk_ptr, w.blk_pad, mb, kb)
    assert torch.equal(again, w.units)
    assert torch.equal(CSBMatrix.from_dense(-w.to_dense(), block_size=64).units, w.units)


@pytest.mark.parametrize("direction", [FORWARD, TRANSPOSED])
def test_the_checker_sees_a_broken_unit(direction: int) -> None:
    w = random_matrix(700, 900, 0.5, block_size=32)
    check_coverage(w, w.units)
    assert w.units.shape[1] > 4
    blocks = w.blk_pad.numel()

    def broken(index: int, value: int) -> Tensor:
        units = w.units.clone()
        units[direction, index] = value
        return units

    for units in (broken(0, 1), broken(-1, blocks - 1), broken(2, int(w.units[direction, 1]) - 1)):
        with pytest.raises(AssertionError, match=f"direction {direction}"):
            check_coverage(w, units)
    with pytest.raises(AssertionError, match=f"direction {direction}: .* nonzeros"):
        check_balance(w, broken(1, int(w.units[direction, 2])))


def test_visits_counts_an_overlap() -> None:
    """Units are boundaries, so only boundaries that fall make two of them touch one entry."""
    w = random_matrix(256, 256, 0.5, block_size=64)
    overlapping = torch.tensor([[0, 9, 4, 16]] * 2, dtype=torch.int32)
    assert visits(w, overlapping, FORWARD).max() == 2
    with pytest.raises(AssertionError, match="units overlap"):
        check_coverage(w, overlapping)


def test_plan_rejects_what_does_not_fit() -> None:
    w = random_matrix(200, 200, 0.5)
    with pytest.raises(RuntimeError, match=r"blk_ptr: expected 13 contiguous int32 elements, got 17"):
        torch.ops.torch_csb.plan(w.blk_ptr, w.blk_pad, 4, 3)
    with pytest.raises(RuntimeError, match="blk_ptr: expected 17 contiguous int32 elements"):
        torch.ops.torch_csb.plan(w.blk_ptr.long(), w.blk_pad, 4, 4)
