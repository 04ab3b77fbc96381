"""What a framework calls of ours: an error in it ends the observation, never the training."""

from __future__ import annotations

import functools
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from stethoscope._parts import asked, is_asked
from stethoscope._secrets import trace_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Method = TypeVar("_Method", bound="Callable[..., Any]")

log = logging.getLogger("stethoscope")


def keeps_out(method: _Method) -> _Method:
    """Wrap what a framework calls of a callback with `give_up(error)` and `given_up`.

    An error in it is said as `part-disabled`, the callback ends its observation, and its methods do nothing from there on: half a
    step or a phase that was not left would make wrong numbers of all that follows. What is meant for the training (`FindingsError` by
    a guard, and what is raised in `for_the_user`) passes.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.given_up:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if is_asked(error):
                raise
            name = type(self).__name__
            log.error(  # noqa: TRY400 - that would write the traceback as it is
                "%s.%s has failed and observes nothing from here on.\n%s", name, method.__name__, trace_of(error)
            )
            self.given_up = True
            try:
                self.give_up(error)
            except Exception as second:
                log.error("Ending %s failed as well.\n%s", name, trace_of(second))  # noqa: TRY400
            return None

    return cast("_Method", call)


@contextmanager
def for_the_user() -> Iterator[None]:
    """Let errors pass: before the first step, whoever has made a mistake wants to hear of it."""
    try:
        yield
    except Exception as error:
        asked(error)
        raise
