"""Passes of a model that are no part of its training: audits make them, and probes do not read them."""

from __future__ import annotations

from contextlib import contextmanager
from threading import local
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Depth(local):
    value = 0


_depth = _Depth()
_anywhere: list[None] = []  # one per audit at work, of all threads: append and pop need no lock


@contextmanager
def aside() -> Iterator[None]:
    """Within it, no probe reads what models do on this thread."""
    _depth.value += 1
    _anywhere.append(None)
    try:
        yield
    finally:
        _anywhere.pop()
        _depth.value -= 1


def is_aside(*, anywhere: bool = False) -> bool:
    """Whether an audit is at work on this thread; or on any: autograd calls hooks on a thread of the device's own."""
    return bool(_anywhere) if anywhere else _depth.value > 0
