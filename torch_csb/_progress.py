"""A progress bar on stderr, where tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Sequence[T], what: str, unit: str, *, show: bool | None = None, delay: float = 0.0) -> Iterator[T]:
    """The items, with a bar.

    Args:
        show: None shows it on a terminal only.
        delay: seconds of work after which it appears.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    # tqdm's own disable=None means: only on a terminal.
    disable = None if show is None else not show
    yield from tqdm(items, what, disable=disable, delay=delay, unit=" " + unit, file=sys.stderr, leave=False)
