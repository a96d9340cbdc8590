"""The format's contract, by its own numbers (csrc/csb/csb.h, docs/format.md)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import BLOCK_SIZES, build
from torch import Tensor

from torch_csb import CSBMatrix, convert, reference
from torch_csb.layout import Layout, bitmap_bit, count_bits
from torch_csb.testing import MATRICES, NamedMatrix, matrix, uniform

# Letters of the golden vectors stand for 1, 2, 3, ...
FIRST = {"a": (0, 0), "b": (1, 0), "c": (1, 4), "d": (2, 3), "e": (2, 5), "f": (4, 3), "g": (4, 4)} | {
    "h": (5, 2),
    "i": (5, 4),
    "j": (5, 5),
}
SECOND = {"a": (0, 0), "b": (1, 0), "c": (2, 3), "d": (2, 5), "e": (4, 3), "f": (4, 4), "g": (5, 5)}


def lettered(places: dict[str, tuple[int, int]]) -> Tensor:
    dense = torch.zeros(6, 6)
    for letter, place in places.items():
        dense[place] = ord(letter) - ord("a") + 1
    return dense


def digits(text: str) -> list[int]:
    return [int(digit) for digit in text.split()]


def letters(text: str) -> list[float]:
    return [float(ord(letter) - ord("a") + 1) for letter in text.split()]


def test_golden_vector() -> None:
    w = CSBMatrix.from_dense(lettered(FIRST), block_size=2)
    assert w.values.tolist() == letters("a b c d e f h g i j")
    assert w.row_ind.tolist() == digits("0 1 1 0 0 0 1 0 1 1")
    assert w.col_ind.tolist() == digits("0 0 0 1 1 1 0 0 0 1")
    assert w.blk_ptr.tolist() == digits("0 2 2 3 3 4 5 5 7 10")
    w.validate()


def test_golden_vector_with_empty_blocks() -> None:
    w = CSBMatrix.from_dense(lettered(SECOND), block_size=2)
    assert w.values.tolist() == letters("a b c d e f g")
    assert w.row_ind.tolist() == digits("0 1 0 0 0 0 1")
    assert w.col_ind.tolist() == digits("0 0 1 1 1 0 1")
    assert w.blk_ptr.tolist() == digits("0 2 2 2 2 3 4 4 5 7")
    w.validate()


def test_the_slides_golden_vector_is_rejected() -> None:
    """The research slides' arrays for the first matrix name (5, 4) twice."""
    w = CSBMatrix.from_dense(lettered(FIRST), block_size=2)
    w.values = torch.tensor(letters("a b c d e f g h i j"))
    w.codes = reference.encode(
        torch.tensor(digits("0 1 1 0 0 0 0 1 1 1")), torch.tensor(digits("0 0 0 1 1 1 0 0 0 1")), 2
    )
    at = reference.decode(w)
    assert list(zip(at.row.tolist(), at.col.tolist(), strict=True)).count((5, 4)) == 2
    with pytest.raises(ValueError, match="^invariant [45]: "):
        w.validate()
    # In the block before, h and g also stand in the wrong order. With that mended the duplicate is what remains.
    w.codes[10:14] = w.codes[10:14].roll(2)
    with pytest.raises(ValueError, match=r"^invariant 4: .*\(5, 4\)"):
        w.validate()


def packed(dense: np.ndarray, mask: np.ndarray, block_size: int) -> dict[str, list]:
    """The contract, word by word and entry by entry."""
    m, k = dense.shape
    alignment = 8 if block_size >= 16 else 1
    arrays: dict[str, list] = {"values": [], "codes": [], "blk_ptr": [0], "blk_pad": []}
    for top in range(0, m, block_size):
        for left in range(0, k, block_size):
            rows, cols = np.nonzero(mask[top : top + block_size, left : left + block_size])
            pad = -len(rows) % alignment
            flip = (rows & (min(block_size // 8, 8) - 1)) << 3 if block_size >= 16 else 0
            arrays["codes"] += (rows * block_size + (cols ^ flip)).tolist() + [0] * pad
            arrays["values"] += dense[rows + top, cols + left].tolist() + [0.0] * pad
            arrays["blk_ptr"].append(len(arrays["values"]))
            arrays["blk_pad"].append(pad)
    return arrays


@pytest.mark.parametrize("block_size", [2, 8, *BLOCK_SIZES])
@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_packing_follows_the_contract(case: NamedMatrix, block_size: int, device: str) -> None:
    w = build(case, device=device, block_size=block_size)
    want = packed(case.dense().numpy(), case.mask().numpy(), block_size)
    assert w.values.tolist() == want["values"]
    assert w.codes.cpu().view(torch.uint16).tolist() == want["codes"]
    assert w.blk_ptr.tolist() == want["blk_ptr"]
    assert w.blk_pad.tolist() == want["blk_pad"]
    assert (w.values.dtype, w.codes.dtype, w.blk_ptr.dtype) == (torch.float32, torch.uint8, torch.int32)
    assert w.nnz == int(case.mask().sum()) and w.values.numel() - w.nnz == sum(want["blk_pad"])
    w.validate()
    assert torch.equal(w.to_dense().cpu(), case.dense())
    assert torch.equal(reference.to_dense(w).cpu(), case.dense())


@pytest.mark.parametrize("block_size", [2, 4, 8, *BLOCK_SIZES])
def test_codes_are_a_bijection(block_size: int) -> None:
    row, col = torch.meshgrid(torch.arange(block_size), torch.arange(block_size), indexing="ij")
    row, col = row.reshape(-1), col.reshape(-1)
    codes = reference.encode(row, col, block_size)
    assert codes.view(torch.uint16).int().sort().values.tolist() == list(range(block_size**2))
    layout = Layout.of_block_size(block_size)
    assert torch.equal(layout.encode(row, col), codes)
    assert all(torch.equal(got, want.int()) for got, want in zip(layout.decode(codes), (row, col), strict=True))


# --- bitmaps ----------------------------------------------------------------------------------------------------------


def packed_bitmap(dense: np.ndarray, mask: np.ndarray) -> dict[str, list]:
    """The contract with a bitmap, bit by bit."""
    m, k = dense.shape
    arrays: dict[str, list] = {"values": [], "words": [], "codes": []}
    for top in range(0, m, 64):
        for left in range(0, k, 64):
            words = [0] * 128
            found = np.argwhere(mask[top : top + 64, left : left + 64]).tolist()
            for row, col in sorted(found, key=lambda place: (place[1] // 16, place)):
                tile = col // 16 * 4 + row // 16
                words[tile * 8 + row % 8] |= 1 << (8 * (col % 4) + 2 * (col // 4 % 4) + row // 8 % 2)
                arrays["values"].append(dense[top + row, left + col])
                arrays["codes"].append(row * 64 + (col ^ (row % 8 * 8)))
            arrays["words"] += words
            arrays["values"] += [0.0] * (-len(found) % 8)
            arrays["codes"] += [0] * (-len(found) % 8)
    return arrays


@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_packing_a_bitmap_follows_the_contract(case: NamedMatrix, device: str) -> None:
    w, with_codes = (build(case, device=device, block_size=blocks) for blocks in ("bitmap", 64))
    want = packed_bitmap(case.dense().numpy(), case.mask().numpy())
    assert w.values.tolist() == want["values"]
    assert w.codes.dtype == torch.int64
    assert np.array_equal(w.codes.cpu().numpy().view(np.uint32), np.array(want["words"], dtype=np.uint32))
    assert convert.entry_codes(w).cpu().view(torch.uint16).tolist() == want["codes"]
    for name in ("blk_ptr", "blk_pad", "units"):
        assert torch.equal(getattr(w, name), getattr(with_codes, name)), name
    w.validate()
    assert torch.equal(w.to_dense().cpu(), case.dense())
    assert torch.equal(reference.to_dense(w).cpu(), case.dense())


@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_one_encoding_converts_to_the_other(case: NamedMatrix, device: str) -> None:
    w = build(case, device=device, block_size=64)
    there = CSBMatrix.from_coo(w.to_coo(), encoding="bitmap")
    back = CSBMatrix.from_coo(there.to_coo(), block_size=64, encoding="codes")
    fresh = build(case, device=device, block_size="bitmap")
    for name in ("values", "codes", "blk_ptr", "blk_pad", "units"):
        assert torch.equal(getattr(there, name), getattr(fresh, name)), name
        assert torch.equal(getattr(back, name), getattr(w, name)), name
    assert (w.layout.encoding, there.layout.encoding, back.layout) == ("codes", "bitmap", w.layout)


def test_bits_are_a_bijection() -> None:
    row, col = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    bit = bitmap_bit(row, col).flatten()
    assert bit.sort().values.tolist() == list(range(64**2))
    assert torch.equal(reference.bitmap_place()[bit], torch.arange(64**2))
    assert Layout.of_block_size(64, "bitmap").rank(row, col).flatten().sort().values.tolist() == list(range(64**2))


def test_bits_are_counted() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (1000,), dtype=torch.int64)
    words[:3] = torch.tensor([0, -1, -(2**63)])
    assert count_bits(words).tolist() == [bin(word % 2**64).count("1") for word in words.tolist()]


def test_codes_of_a_bitmap_that_contradicts_blk_ptr_stay_inside_their_block(device: str) -> None:
    w = build(matrix("uniform_50"), device=device, block_size="bitmap")
    full = torch.full_like(w.codes, -1)
    for words in (full, torch.zeros_like(full)):
        codes = torch.ops.torch_csb.to_codes(words, w.blk_ptr, w.blk_pad, w.m, w.k, w.values.numel())
        rows = w.layout.decode(codes)[0][w.is_entry]
        assert codes.shape == (2 * w.values.numel(),) and bool((rows < 64).all())


# --- validate(): each invariant broken on its own ---------------------------------------------------------------------


def tampered(block_size: int = 16) -> CSBMatrix:
    """A matrix of 3 x 3 blocks with padding, edge blocks and an empty block, ready to be damaged."""
    dense = torch.arange(1.0, 41 * 43 + 1).view(41, 43) * (torch.rand(41, 43) < 0.3)
    dense[:16, 16:32] = 0
    w = CSBMatrix.from_dense(dense, block_size=block_size)
    assert w.blk_pad[0] > 0 and w.blk_ptr[1] == w.blk_ptr[2]
    return w


def put(w: CSBMatrix, entry: int, row: int, col: int) -> None:
    w.codes[2 * entry : 2 * entry + 2] = reference.encode(torch.tensor([row]), torch.tensor([col]), w.block_size)


def last_entry(w: CSBMatrix, block: int) -> int:
    return int(w.blk_ptr[block + 1]) - int(w.blk_pad[block]) - 1


def unequal_start(w: CSBMatrix) -> None:
    w.blk_ptr[0] = 8


def falling(w: CSBMatrix) -> None:
    w.blk_ptr[4] = w.blk_ptr[2] - 8


def unaligned(w: CSBMatrix) -> None:
    w.blk_ptr[1] += 1


def short_blk_ptr(w: CSBMatrix) -> None:
    w.blk_ptr = w.blk_ptr[:-1]


def long_blk_ptr(w: CSBMatrix) -> None:
    w.blk_ptr = torch.cat((w.blk_ptr, w.blk_ptr[-1:]))


def wide_blk_ptr(w: CSBMatrix) -> None:
    w.blk_ptr = w.blk_ptr.long()


def too_few_codes(w: CSBMatrix) -> None:
    w.codes = w.codes[:-2]


def wide_codes(w: CSBMatrix) -> None:
    w.codes = w.codes.view(torch.int16)


def code_beyond_block(w: CSBMatrix) -> None:
    w.codes[0:2] = 255


def duplicate(w: CSBMatrix) -> None:
    w.codes[2:4] = w.codes[0:2]


def row_outside(w: CSBMatrix) -> None:
    put(w, last_entry(w, 6), 9, 3)  # the last block row has 41 - 32 = 9 rows


def column_outside(w: CSBMatrix) -> None:
    put(w, last_entry(w, 2), 15, 11)  # the last block column has 43 - 32 = 11 columns


def swapped(w: CSBMatrix) -> None:
    w.codes[:4] = w.codes[:4].roll(2)


def padding_with_code(w: CSBMatrix) -> None:
    put(w, int(w.blk_ptr[1]) - 1, 1, 1)


def padding_with_value(w: CSBMatrix) -> None:
    w.values[w.blk_ptr[1] - 1] = 1.0


def more_padding_than_block(w: CSBMatrix) -> None:
    w.blk_pad[1] = 1


def short_blk_pad(w: CSBMatrix) -> None:
    w.blk_pad = w.blk_pad[1:]


def too_few_values(w: CSBMatrix) -> None:
    w.values = w.values[:-1]


def integer_values(w: CSBMatrix) -> None:
    w.values = w.values.int()


def tampered_bitmap() -> CSBMatrix:
    """3 x 3 blocks with padding, edge blocks and an empty block."""
    dense = torch.arange(1.0, 137 * 139 + 1).view(137, 139) * (torch.rand(137, 139) < 0.3)
    dense[:64, 64:128] = 0
    dense[0, 0], dense[0, 1] = 1, 0
    w = CSBMatrix.from_dense(dense, encoding="bitmap")
    while w.blk_pad[0] == 0 or w.blk_pad[2] == 0:  # one entry less
        dense[dense[:64, :64].nonzero()[1].tolist()] = 0
        w = CSBMatrix.from_dense(dense, encoding="bitmap")
    assert w.blk_ptr[1] == w.blk_ptr[2]
    return w


def short_bitmap(w: CSBMatrix) -> None:
    w.codes = w.codes[:-1]


def codes_in_place_of_a_bitmap(w: CSBMatrix) -> None:
    w.codes = convert.entry_codes(w)


def bit_too_few(w: CSBMatrix) -> None:
    w.codes[0] &= ~1  # the entry at (0, 0)


def bit_too_many(w: CSBMatrix) -> None:
    w.codes[0] |= 1 << 8  # (0, 1)


def bit_in_an_empty_block(w: CSBMatrix) -> None:
    w.codes[64] = -(2**63)


def bit_in_another_block(w: CSBMatrix) -> None:
    bit_too_few(w)
    bit_in_an_empty_block(w)


def bit_below_the_matrix(w: CSBMatrix) -> None:
    w.codes[6 * 64 :][: bitmap_word_64(9, 0) + 1][-1] |= 1 << int(bitmap_bit(*torch.tensor([9, 0]))) % 64


def bit_right_of_the_matrix(w: CSBMatrix) -> None:
    w.codes[2 * 64 + bitmap_word_64(0, 11)] |= 1 << int(bitmap_bit(*torch.tensor([0, 11]))) % 64


def bitmap_word_64(row: int, col: int) -> int:
    return int(bitmap_bit(*torch.tensor([row, col]))) // 64


COMMON_DAMAGE = (
    *((2, f) for f in (unequal_start, falling, unaligned, short_blk_ptr, long_blk_ptr, wide_blk_ptr)),
    *((5, f) for f in (padding_with_value, more_padding_than_block, short_blk_pad)),
    *((6, f) for f in (too_few_values, integer_values)),
)
DAMAGE = {
    tampered: (
        *COMMON_DAMAGE,
        *((3, f) for f in (too_few_codes, wide_codes, code_beyond_block)),
        *((4, f) for f in (duplicate, row_outside, column_outside)),
        *((5, f) for f in (swapped, padding_with_code)),
    ),
    tampered_bitmap: (
        *COMMON_DAMAGE,
        *((3, f) for f in (short_bitmap, codes_in_place_of_a_bitmap, bit_too_few, bit_too_many)),
        *((3, f) for f in (bit_in_an_empty_block, bit_in_another_block)),
        *((4, f) for f in (bit_below_the_matrix, bit_right_of_the_matrix)),
    ),
}


@pytest.mark.parametrize(
    ("make", "number", "damage"),
    [(make, *case) for make, cases in DAMAGE.items() for case in cases],
    ids=lambda value: getattr(value, "__name__", f"invariant_{value}"),
)
def test_validate_names_the_broken_invariant(
    make: Callable[[], CSBMatrix], number: int, damage: Callable[[CSBMatrix], None]
) -> None:
    w = make()
    w.validate()
    damage(w)
    with pytest.raises(ValueError, match=rf"^invariant {number}: "):
        w.validate()


def test_an_empty_matrix_has_an_empty_bitmap() -> None:
    w = CSBMatrix.from_dense(torch.zeros(70, 70), encoding="bitmap")
    w.validate()
    w.codes[70] = 1
    with pytest.raises(ValueError, match="^invariant 3: codes: expected 0 bits in block 1 as blk_ptr says, got 1"):
        w.validate()


def test_untrusted_arrays_are_validated() -> None:
    w = tampered()
    arrays = (w.values, w.codes, w.blk_ptr, w.blk_pad)
    again = CSBMatrix.from_arrays(*arrays, m=w.m, k=w.k, layout=w.layout)
    assert torch.equal(again.to_dense(), w.to_dense()) and torch.equal(again.units, w.units)
    duplicate(w)
    with pytest.raises(ValueError, match="^invariant 4: "):
        CSBMatrix.from_arrays(*arrays, m=w.m, k=w.k, layout=w.layout)


def test_an_offset_array_that_wraps_around_is_rejected() -> None:
    """65 536 blocks of 65 536 entries: each difference is right modulo 2^32, and the last offset is 0 again."""
    side = 256 * 256
    blk_ptr = (torch.arange(side + 1, dtype=torch.int64) * 256**2).to(torch.int32)
    assert blk_ptr[-1] == 0
    with pytest.raises(ValueError, match="^invariant 2: "):
        CSBMatrix.from_arrays(
            torch.empty(0),
            torch.empty(0, dtype=torch.uint8),
            blk_ptr,
            torch.zeros(side, dtype=torch.uint8),
            m=side,
            k=side,
            layout=Layout.of_block_size(256),
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([2, 64, 0, 8], "version 1, got 2"),
        ([1, 48, 0, 8], "block_size: .*48"),
        ([1, 64, 9, 8], "order"),
        ([1, 32, 1, 8], "block_size: expected 64 with a bitmap, got 32"),
        ([1, 64, 0, 3], "alignment"),
    ],
)
def test_a_layout_without_meaning_is_rejected(fields: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.from_tensor(torch.tensor(fields, dtype=torch.int32))


def test_layout_round_trip() -> None:
    for block_size in (2, *BLOCK_SIZES):
        layout = Layout.of_block_size(block_size)
        assert layout.to_tensor().dtype == torch.int32
        assert Layout.from_tensor(layout.to_tensor()) == layout
    layout = Layout.of_block_size(64, "bitmap")
    assert layout.to_tensor().tolist() == [1, 64, 1, 8] and Layout.from_tensor(layout.to_tensor()) == layout
    assert (layout.encoding, layout.order) == ("bitmap", "quarter_major")
    with pytest.raises(ValueError, match="encoding: expected one of codes, bitmap, got 'bits'"):
        Layout.of_block_size(64, "bits")


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95, 0.98])
def test_padding_and_plan_cost_little(sparsity: float, block_size: int) -> None:
    """Invariant 8, for bfloat16, where the share is largest; block offsets are counted as plan."""
    side = int((1_000_000 / (1 - sparsity)) ** 0.5) + 1
    weight = uniform(side, side, sparsity).to(torch.bfloat16)
    w = CSBMatrix.from_dense(weight, block_size=block_size, encoding="codes")
    assert w.nnz > 990_000
    entry = w.values.element_size() + 2
    plan = 4 * w.blk_ptr.numel() + w.blk_pad.numel() + 4 * w.units.numel()
    overhead = entry * (w.values.numel() - w.nnz) + plan
    share = overhead / (entry * w.values.numel() + plan)
    print(f"padding and plan, {side}x{side}, {sparsity:.0%}, block size {block_size}: {share:.2%}")
    assert w.nbytes == entry * w.values.numel() + plan
    if block_size == 64:
        bitmap = CSBMatrix.from_dense(weight, encoding="bitmap")
        words = bitmap.codes.numel() * 8
        assert bitmap.nbytes == w.values.nbytes + words + plan
        assert (bitmap.nbytes < w.nbytes) == (sparsity < 1 - 1 / 16)
    assert share < (0.08 if sparsity > 0.95 else 0.05)
