"""A monitor that nobody closes: dropped, it takes its hooks along, at a moment when torch is not at work with them.

Where the process ends first, it hands over what it still holds.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from threading import get_ident
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakMethod, finalize

from stethoscope._secrets import trace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from torch.utils.hooks import RemovableHandle

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("stethoscope")

_CALLERS = {"torch.nn.modules.module", "torch.optim.optimizer", "torch._dynamo.eval_frame"}
"""Who calls hooks, going through a dictionary meanwhile and asking late how a hook is to be called; and who calls what is
compiled, and does not expect another stance at its end than at its beginning."""


class _Flushes(Protocol):
    def flush(self) -> None: ...


class _LeftOpen:
    """What is to be flushed when the process ends: not its forks, whose parent does so."""

    def __init__(self) -> None:
        self._owners: WeakKeyDictionary[_Flushes, int] = WeakKeyDictionary()
        self._registered = False

    def add(self, owner: _Flushes) -> None:
        if not self._registered:
            self._registered = True
            atexit.register(self.flush)  # as late as that, so that it comes before what ends the threads that it needs
        self._owners[owner] = os.getpid()

    def discard(self, owner: _Flushes) -> None:
        self._owners.pop(owner, None)

    def flush(self) -> None:
        for owner, process in list(self._owners.items()):
            if process != os.getpid():
                continue
            try:
                owner.flush()
            except Exception as error:  # on_finding, say: the others are still to be flushed
                log.warning("What a monitor still held at the end of the process may be lost.\n%s", trace_of(error))


left_open = _LeftOpen()


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


def later(call: Callable[[], None]) -> None:
    """Call `call` when the collector comes next and torch is not at work."""
    when_dropped(_Cycle(), [call])


def unhook_optimizers(handles: list[RemovableHandle]) -> None:
    """Remove hooks of optimizers now or, inside of an optimizer's step, soon.

    Torch goes through the living dictionary of them, so that whoever steps a monitor in such a hook would see it change.
    """

    def leave() -> None:
        while handles:
            handles.pop().remove()

    if under_way({"torch.optim.optimizer"}, here=True):
        later(leave)
    else:
        leave()


def weakly(method: Callable[P, T]) -> Callable[P, T | None]:
    """Return a call of `method` that does not keep its object alive, and gives None when that is gone."""
    reference = WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        bound = reference()
        return None if bound is None else bound(*args, **kwargs)

    return call


def _leave(leave: Sequence[Callable[[], None]]) -> None:
    if under_way(_CALLERS, here=True):
        when_dropped(_Cycle(), leave)
        return
    for each in leave:
        each()


def under_way(modules: Container[str], *, here: bool) -> bool:
    """Whether another thread, or `here` this one too, is in code of one of these modules or in what it has called."""
    # Python holds a lock while it lists the frames: a collection that begins there and asks again, as `_leave` does, would wait for
    # itself for ever (python/cpython#106883)
    collects = gc.isenabled()
    gc.disable()
    try:
        everyone = sys._current_frames()  # noqa: SLF001
    finally:
        if collects:
            gc.enable()
    # this function's own frame is left out: in a variable of its own it would live on, and with it all that has called it
    frames = [everyone[thread] for thread in everyone if thread != get_ident()]
    del everyone
    if here:
        frames.append(sys._getframe(1))  # noqa: SLF001
    while frames:
        frame = frames.pop()
        if frame.f_globals.get("__name__") in modules:
            return True
        if frame.f_back is not None:
            frames.append(frame.f_back)
    return False
