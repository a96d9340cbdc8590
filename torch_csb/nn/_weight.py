from __future__ import annotations

from typing import Any, NoReturn

import torch

_OPERATORS = """
    add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv rfloordiv mod rmod pow rpow
    matmul rmatmul neg pos abs invert and or xor lt le gt ge eq ne bool int float complex index
    getitem setitem delitem contains iter len array
"""


class WeightDataError(TypeError, AttributeError):
    """A compressed weight was used as data. Also an ``AttributeError``, so that ``hasattr`` and ``getattr`` with a
    default, by which libraries probe weights, find the attribute absent."""


class CompressedWeight:
    """What ``layer.weight`` is on a CSB layer: its shape, dtype and device, without data.

    Libraries ask a layer's weight for these three. Everything that needs elements raises ``TypeError``. As the type
    has ``__torch_function__``, fused paths that read dense weights (``nn.TransformerEncoderLayer`` in eval) see that
    this is no plain tensor and call the layer instead.
    """

    __slots__ = ("_name", "device", "dtype", "requires_grad", "shape")

    def __init__(self, name: str, shape: tuple[int, ...], values: torch.Tensor) -> None:
        put = object.__setattr__
        put(self, "_name", name)
        put(self, "shape", torch.Size(shape))
        put(self, "dtype", values.dtype)
        put(self, "device", values.device)
        put(self, "requires_grad", values.requires_grad)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __repr__(self) -> str:
        return f"<compressed weight of a {self._name}: shape={tuple(self.shape)}, dtype={self.dtype}>"

    # __eq__ below raises, which would otherwise take the hash away.
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Protocol probes of copy, pickle and numpy.
            raise AttributeError(name)
        raise WeightDataError(_message(self._name, f"weight.{name}"))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise WeightDataError(_message(self._name, f"weight.{name} = …"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        operands = [*args, *(kwargs or {}).values()]
        operands += [item for group in operands if isinstance(group, (tuple, list)) for item in group]
        owner = next((item._name for item in operands if isinstance(item, cls)), "CSB layer")
        raise TypeError(_message(owner, getattr(func, "__name__", str(func))))


def _message(owner: str, use: str) -> str:
    return (
        f"{use}: the weight of a {owner} is compressed and can't be used as a dense tensor; "
        "call to_dense() on the layer, or train its `values`"
    )


def _refuse(name: str) -> Any:
    def method(self: CompressedWeight, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(_message(self._name, f"weight.__{name}__"))

    return method


for _name in _OPERATORS.split():
    setattr(CompressedWeight, f"__{_name}__", _refuse(_name))
