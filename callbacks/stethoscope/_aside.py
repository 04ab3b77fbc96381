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


@contextmanager
def aside() -> Iterator[None]:
    """Within it, no probe reads what models do on this thread."""
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1


def is_aside() -> bool:
    """Whether an audit is at work on this thread."""
    return _depth.value > 0
