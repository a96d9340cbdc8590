"""What a product would do: which kernel, why, how much it moves, how much scratch it takes."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from torch_csb._winner import dense_wins
from torch_csb.matrix import CSBMatrix

if TYPE_CHECKING:
    from torch_csb.nn import CSBConv2d, CSBLinear


@dataclass(frozen=True)
class Step:
    """One operator of a layer's forward or backward.

    Attributes:
        operator: ``"spmm"``, ``"spmm_t"`` or ``"sddmm"``.
        kernel, tile_n, split, reason: the planner's choice and why. ``tile_n`` counts columns of a tile; of the kernel
            "panel" the rows of W, or columns for spmm_t, that are expanded at a time.
        bytes_moved: bytes of the weight's arrays and of the activations, each counted once.
        workspace: bytes of scratch that the call allocates and frees.
        balance: nonzeros of the heaviest work unit over the mean; 1 is even.
        dense_faster: whether a dense product would be faster, by rules fitted to measurements on uniform patterns (an
            NVIDIA H200, and two cores of an AVX-512 CPU).
    """

    operator: str
    kernel: str
    tile_n: int
    split: bool | int
    reason: str
    bytes_moved: int
    workspace: int
    balance: float
    dense_faster: bool


@dataclass(frozen=True)
class Explanation:
    """``steps`` for Y = W.X, dX = W^T.dY and dW; ``dense_bytes`` that a dense product moves, each counted once."""

    shape: tuple[int, int]
    columns: int
    dtype: torch.dtype
    device: str
    sparsity: float
    steps: tuple[Step, ...]
    dense_bytes: int

    @property
    def dense_faster(self) -> bool:
        """Of the forward product."""
        return self.steps[0].dense_faster

    def __str__(self) -> str:
        m, k = self.shape
        lines = [
            f"{m} x {k}, {self.sparsity:.1%} zeros, {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"n = {self.columns}",
            f"  dense   moves {self.dense_bytes / 1e6:.2f} MB",
        ]
        for step in self.steps:
            tile = f"{step.tile_n} features a panel" if step.kernel == "panel" else f"{step.tile_n} columns a tile"
            lines.append(
                f"  {step.operator:<7} dense would be {'faster' if step.dense_faster else 'slower'}; "
                f"{step.kernel}, {tile}, moves {step.bytes_moved / 1e6:.2f} MB, scratch {step.workspace / 1e6:.2f} MB, "
                f"heaviest unit {step.balance:.2f} of the mean: {step.reason}"
            )
        return "\n".join(lines)


def explain(layer: CSBLinear | CSBConv2d | CSBMatrix, batch: int) -> Explanation:
    """Says which kernels a layer would run on n = ``batch`` columns (tokens, or pixels of all images).

    Args:
        layer: a CSBLinear, a CSBConv2d or a CSBMatrix, on the device where it will run.
        batch: number of columns, at least 1.

    Raises:
        ImportError: ``torch_csb._plan`` is not built (it needs pybind11 at build time).
        ValueError: ``batch`` is below 1.
    """
    try:
        from torch_csb import _plan
    except ImportError as error:
        raise ImportError("explain needs torch_csb._plan: pip install pybind11 and build torch_csb again") from error
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    w = layer if isinstance(layer, CSBMatrix) else layer.matrix
    dtype = str(w.dtype).removeprefix("torch.")
    item, accumulator = w.values.element_size(), 8 if w.dtype == torch.float64 else 4
    stored, num_units = w.values.numel(), w.units.shape[1] - 1
    pattern = w.codes.nbytes + (w.blk_ptr.numel() + w.units.numel()) * 4 + w.blk_pad.numel()
    activations = (w.m + w.k) * batch * item

    chip = ()
    if w.device.type == "cuda":
        properties = torch.cuda.get_device_properties(w.device)
        hopper, shared_bytes = properties.major == 9, properties.shared_memory_per_block_optin
        chip = (properties.multi_processor_count, hopper, shared_bytes)

    def given(features: int, depth: int) -> tuple[object, ...]:
        """The chip, and that activations as nn.Linear passes them suit a dense product."""
        return (chip[0], _plan.PanelOffer(True, features, depth, stored)) if chip else ()

    choose_spmm = _plan.choose_cuda_spmm if chip else _plan.choose_cpu_spmm
    choose_sddmm = _plan.choose_cuda_sddmm if chip else _plan.choose_cpu_sddmm

    steps = []
    balances = [_balance(_plan, w, column_major) for column_major in (False, True)]
    for operator, features, depth, balance in (("spmm", w.m, w.k, balances[0]), ("spmm_t", w.k, w.m, balances[1])):
        strips = -(-features // w.block_size)
        bitmap = w.layout.encoding == "bitmap"
        pieces = item != 2 or not (1 if bitmap else 2) <= batch <= (16 if bitmap else 8) or depth % 8 == 0
        forms = (-(-depth // w.block_size), pieces, *chip[1:], bitmap) if chip else ()
        choice = choose_spmm(dtype, w.block_size, strips, num_units, batch, *given(features, depth), *forms)
        split = bool(choice.split) and num_units > 1
        workspace = (num_units + strips) * w.block_size * batch * accumulator if split else 0
        if choice.kernel == "panel":
            workspace = _panel_bytes(choice.tile_n, depth, item)
        moved = stored * item + pattern + activations
        dense = dense_wins(operator, bool(chip), item, features, depth, batch, w.sparsity)
        steps.append(
            Step(operator, choice.kernel, choice.tile_n, split, choice.reason, moved, workspace, balance, dense)
        )
    forms = (True, chip[2]) if chip else ()
    choice = choose_sddmm(dtype, w.block_size, num_units, batch, *given(w.m, w.k), *forms)
    workspace = choice.split * stored * accumulator if choice.split > 1 else 0
    if choice.kernel == "panel":
        workspace = _panel_bytes(choice.tile_n, w.k, item)
    moved = stored * item + pattern + activations
    steps.append(
        Step(
            operator="sddmm",
            kernel=choice.kernel,
            tile_n=choice.tile_n,
            split=choice.split,
            reason=choice.reason,
            bytes_moved=moved,
            workspace=workspace,
            balance=balances[0],
            dense_faster=dense_wins("sddmm", bool(chip), item, w.m, w.k, batch, w.sparsity),
        )
    )
    if w.transposed:
        steps[0], steps[1] = steps[1], steps[0]
    return Explanation(
        shape=tuple(w.shape),
        columns=batch,
        dtype=w.dtype,
        device=str(w.device),
        sparsity=w.sparsity,
        steps=tuple(steps),
        dense_bytes=w.m * w.k * item + activations,
    )


def _panel_bytes(features: int, depth: int, item: int) -> int:
    return features * -(-depth // 8) * 8 * item


def _balance(planner: ModuleType, w: CSBMatrix, column_major: bool) -> float:
    mb, kb = -(-w.m // w.block_size), -(-w.k // w.block_size)
    blk_ptr, blk_pad, begin = (array.cpu().numpy() for array in (w.blk_ptr, w.blk_pad, w.units[int(column_major)]))
    nonzeros = planner.unit_nonzeros(blk_ptr, blk_pad, mb, kb, begin, column_major)
    return float(nonzeros.max() / nonzeros.mean()) if nonzeros.any() else 1.0
