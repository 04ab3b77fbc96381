"""A monitor that is dropped without `close` takes its hooks along, at a moment when torch is not going through them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING
from weakref import WeakMethod, finalize

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CALLERS = {each.__code__.co_filename for each in (nn.Module.register_forward_hook, Optimizer.register_step_pre_hook)}
"""Who calls hooks. They go through a dictionary meanwhile, and ask late how a hook is to be called."""


class _Cycle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def when_dropped(owner: object, leave: Sequence[Callable[[], None]]) -> None:
    """Call all of `leave` soon after `owner` is gone; not at the end of the process.

    The collector may come at any allocation, so also between two hooks of one module; then it is asked to come again.

    Args:
        owner: what is dropped.
        leave: must not hold `owner`. May grow.
    """
    finalize(owner, _leave, leave).atexit = False


def weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Return a call of `method` that does not keep its object alive, and does nothing when that is gone."""
    reference = WeakMethod(method)

    def call() -> None:
        bound = reference()
        if bound is not None:
            bound()

    return call


def _leave(leave: Sequence[Callable[[], None]]) -> None:
    if _calling_hooks():
        when_dropped(_Cycle(), leave)
        return
    for each in leave:
        each()


def _calling_hooks() -> bool:
    frames = [*sys._current_frames().values()]  # noqa: SLF001  # of all threads
    while frames:
        frame = frames.pop()
        if frame.f_code.co_filename in _CALLERS:
            return True
        if frame.f_back is not None:
            frames.append(frame.f_back)
    return False
