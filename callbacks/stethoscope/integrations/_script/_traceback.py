"""A traceback that nobody catches is the script's: our one frame in it, of what wraps `backward`, is left out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stethoscope.integrations import _loss

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


def install() -> Callable[[], None]:
    """Wrap `sys.excepthook`, and return what puts it back."""
    original = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        hide(error, set())
        original(kind, error, trace)

    def undo() -> None:
        if sys.excepthook is excepthook:
            sys.excepthook = original

    sys.excepthook = excepthook
    return undo


def hide(error: BaseException | None, seen: set[int]) -> None:
    """Take our frames out of an error's traceback, and of those of the errors that led to it."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    trace = error.__traceback__
    while trace is not None:
        while trace.tb_next is not None and trace.tb_next.tb_frame.f_code.co_filename == _loss.__file__:
            trace.tb_next = trace.tb_next.tb_next
        trace = trace.tb_next
    hide(error.__cause__, seen)
    hide(error.__context__, seen)
