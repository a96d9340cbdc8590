from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_csb import convert
from torch_csb.layout import Layout
from torch_csb.matrix import CSBMatrix

_ARRAYS = ("codes", "blk_ptr", "blk_pad")


class Deferred(nn.Module):
    """A module whose arrays may come later than itself: made empty, or emptied by ``to_empty()``.

    While they are missing, ``forward`` stands in the instance as :meth:`_forward_unfilled`, so that a module that has
    its data pays nothing for the question.
    """

    m: int
    k: int
    block_size: int
    _layout: Layout

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Deferred:
        was_meta = self._buffers["codes"].is_meta
        super()._apply(fn, recurse)
        # Only to_empty() leads off the meta device; elsewhere it comes here as this function of its own.
        emptied = was_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty")
        if emptied and not self._buffers["codes"].is_meta:
            self._clear()
        return self

    @torch.no_grad()
    def _clear(self) -> None:
        """A pattern that is whatever was in memory before would lead kernels anywhere."""
        for name in (*_ARRAYS, "units"):
            self._buffers[name].zero_()
        self._buffers["layout"].copy_(self._layout.to_tensor())
        self._mark_unfilled()

    def _mark_unfilled(self) -> None:
        self.forward = self._forward_unfilled

    def _mark_filled(self) -> None:
        vars(self).pop("forward", None)

    @property
    def _unfilled(self) -> bool:
        return "forward" in vars(self)

    def _forward_unfilled(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises, but where the tensors were filled in place since, by a broadcast for instance."""
        values, arrays = self._parameters["values"], {name: self._buffers[name] for name in _ARRAYS}
        if values.is_meta:  # Shapes can be told; of an x with data the operator says what is missing.
            return type(self).forward(self, *args, **kwargs)
        try:
            if values.numel() == 0:
                raise ValueError("there are no entries")
            layout = Layout.from_tensor(self._buffers["layout"])
            matrix = CSBMatrix.from_arrays(values, **arrays, m=self.m, k=self.k, layout=layout)
        except ValueError as error:
            raise RuntimeError(self._no_data(str(error))) from None
        self._buffers["units"] = matrix.units
        self._layout, self.block_size = layout, layout.block_size
        self._mark_filled()
        return self(*args, **kwargs)

    def _no_data(self, why: str) -> str:
        return (
            f"{type(self).__name__}: its tensors are unfilled: load its state before it is used, by load_into or "
            f"load_state_dict ({why})"
        )


def empty_matrix(
    m: int,
    k: int,
    *,
    block_size: int | None,
    target: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> CSBMatrix:
    """m × k without entries, also where a device context says meta, on which nothing could be planned."""
    device = torch.get_default_device() if device is None else device
    with torch.device("cpu"):
        nothing = torch.zeros(0, dtype=torch.int64)
        values = torch.zeros(0, dtype=torch.get_default_dtype() if dtype is None else dtype)
        layout = convert.choose_layout(block_size, target)
        return CSBMatrix(**convert.pack_entries(nothing, nothing, values, m, k, layout)).to(device)


def meta_buffers(model: nn.Module) -> list[str]:
    """Buffers on the meta device that are in no state_dict, so that no file will ever fill them."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if not isinstance(module, Deferred)
        for key in module._non_persistent_buffers_set
        if (buffer := module._buffers.get(key)) is not None and buffer.is_meta
    ]
