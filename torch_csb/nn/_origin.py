from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Origin:
    """Where a layer comes from: the dense Parameters that its own, by name (``values``, ``bias``), stand in place of.

    Held weakly, since a converted weight is to be let go. A copy of a layer, by deepcopy or pickle, has none: no
    optimizer that knows the dense model was made for the copy.
    """

    __slots__ = ("_refs", "hooks")

    def __init__(self, **parameters: nn.Parameter | None) -> None:
        # Ids of the hooks that came along, as long as nobody registered them on the layer once more.
        self.hooks: set[int] = set()
        self._refs = {name: weakref.ref(p) for name, p in parameters.items() if p is not None}

    @property
    def known(self) -> frozenset[str]:
        return frozenset(self._refs)

    def alive(self) -> dict[str, nn.Parameter]:
        found = {name: ref() for name, ref in self._refs.items()}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        return Origin, ()


class Converted(nn.Module):
    """A module that may have been made of another one."""

    _origin = Origin()

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """As of ``nn.Module``. torch.ao's ``convert`` registers the dense layer's hooks, which :meth:`from_dense` has
        brought along, on the new layer; they still run once."""
        flags = [self._forward_hooks_with_kwargs, self._forward_hooks_always_called]
        return self._brought(hook, self._forward_hooks, flags) or super().register_forward_hook(hook, **options)

    def register_forward_pre_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        """As of ``nn.Module``, and as :meth:`register_forward_hook`."""
        flags = [self._forward_pre_hooks_with_kwargs]
        return self._brought(hook, self._forward_pre_hooks, flags) or super().register_forward_pre_hook(hook, **options)

    def _brought(
        self, hook: Callable[..., Any], hooks: dict[int, Callable[..., Any]], flags: list[dict[int, Any]]
    ) -> RemovableHandle | None:
        for i in self._origin.hooks:
            if hooks.get(i) is hook:
                self._origin.hooks.remove(i)
                handle = RemovableHandle(hooks, extra_dict=flags)
                handle.id = i
                return handle
        return None
