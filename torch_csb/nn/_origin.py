from __future__ import annotations

import weakref

from torch import nn


class Origin:
    """The dense Parameters that a layer's own stand in place of, by name of the own one (``values``, ``bias``).

    Held weakly, since a converted weight is to be let go. A copy of a layer, by deepcopy or pickle, has none: no
    optimizer that knows the dense model was made for the copy.
    """

    __slots__ = ("_refs",)

    def __init__(self, **parameters: nn.Parameter | None) -> None:
        self._refs = {name: weakref.ref(p) for name, p in parameters.items() if p is not None}

    @property
    def known(self) -> frozenset[str]:
        return frozenset(self._refs)

    def alive(self) -> dict[str, nn.Parameter]:
        found = {name: ref() for name, ref in self._refs.items()}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        return Origin, ()
