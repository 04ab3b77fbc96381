"""What is true of every part that a monitor is made of: it may come from a preset, and it may fail."""

from __future__ import annotations

import functools
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from stethoscope._record import Finding, FindingsError, Severity

if TYPE_CHECKING:
    from collections.abc import Sequence


_ASKED = "_stethoscope_asked"

E = TypeVar("E", bound=BaseException)
MAX_SHOWN = 300  # characters of an error
_Part = TypeVar("_Part")
_Method = TypeVar("_Method", bound=Callable[..., None])


@dataclass
class Notes:
    """What the monitor's own parts have to say, on its way to the next delivery.

    Args:
        strict: raise what goes wrong inside of parts.
        step: the last closed step.
        pending: findings not delivered yet.
        said: parts and errors that were reported.
    """

    strict: bool
    step: int = 0
    pending: deque[Finding] = field(default_factory=deque[Finding])  # sinks add to it from threads of their own
    said: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    unsaid: int = 0  # further failures of what stays on

    def disabled(self, part: object, role: str, error: BaseException, loss: str = "") -> None:
        """Say that a part has failed and is off from here on. Raises the error again if strict.

        Args:
            part: that has failed.
            role: what it is.
            error: that it has raised.
            loss: of a part that stays on, what this failure costs; it is said once per kind of error, then counted.
        """
        if self.strict:
            raise error
        failure = f"{role} {type(part).__name__}", type(error).__name__
        if loss and failure in self.said:
            self.unsaid += 1
            return
        self.said.add(failure)
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" ({Path(last[0].filename).name}:{last[0].lineno})" if last else ""
        first = "Check the path, its permissions and the space on the disk. " if isinstance(error, OSError) else ""
        self.pending.append(
            Finding(
                "part-disabled",
                severity_for(part),
                f"The {role} {type(part).__name__} failed with {type(error).__name__}: {_short(error)}{where}. "
                f"{loss or 'It is switched off;'} the training and all other parts go on.",
                f"{first}Read the traceback in this finding's evidence; Monitor(strict=True) raises it where it happens.",
                self.step,
                evidence={"part": type(part).__name__, "traceback": "".join(traceback.format_exception(error))},
            )
        )

    @contextmanager
    def going_on(self, part: object, doing: str) -> Iterator[None]:
        """Keep an error of ours from the training: it costs what was at hand inside, and is said.

        Around whatever the training calls; parts have a guard of their own, closer to them.
        """
        try:
            yield
        except Exception as error:
            if is_asked(error):
                raise
            self.disabled(part, doing, error, "What it had at hand is lost, and it stays on;")

    def unreadable(self, name: str, error: Exception) -> None:
        """Say once that something given to the monitor could not be looked into. Raises the error again if strict."""
        if self.strict:
            raise error
        if ("unreadable", name) not in self.said:
            self.said.add(("unreadable", name))
            self.pending.append(
                Finding(
                    "probe-read-nothing",
                    "warning",
                    f"{name!r}, given to observe() or step(), cannot be looked into: {error!r}. What asks for it reads nothing.",
                    "Give a tensor, or lists and dictionaries of tensors.",
                    self.step,
                    evidence={"probe": "Monitor", "given": name},
                )
            )

    def take(self) -> list[Finding]:
        """Return what is pending and forget it."""
        return [self.pending.popleft() for _ in range(len(self.pending))]


def asked(error: E) -> E:
    """Mark an error that is meant for the training: it comes from `on_finding`, say."""
    error.__dict__[_ASKED] = True
    return error


def is_asked(error: BaseException) -> bool:
    """Whether an error is meant for the training."""
    return isinstance(error, FindingsError) or _ASKED in error.__dict__


def goes_on(method: _Method) -> _Method:
    """Wrap a method of something with notes by `Notes.going_on`."""

    @functools.wraps(method)
    def call(self: Any, /, *args: Any, **kwargs: Any) -> None:
        with self._notes.going_on(self, f"method {method.__name__} of the"):
            method(self, *args, **kwargs)

    return cast("_Method", call)


def mark_preset(part: object) -> None:
    """Remember that a preset chose this part: that it has nothing to do is then no reason for a warning."""
    object.__setattr__(part, "_from_preset", True)


def from_preset(part: object) -> bool:
    """Whether a preset chose this part."""
    return bool(getattr(part, "_from_preset", False))


def severity_for(part: object) -> Severity:
    """How much it matters that a part is idle or off: less when nobody asked for it by name."""
    return "info" if from_preset(part) else "warning"


def by_severity(parts: Iterable[_Part]) -> dict[Severity, list[_Part]]:
    """Parts that are idle, by how much that matters."""
    found: dict[Severity, list[_Part]] = {}
    for part in parts:
        found.setdefault(severity_for(part), []).append(part)
    return found


def _short(error: BaseException) -> str:
    """The first line of what an error says; torch adds its whole dispatch table, which the traceback in the evidence keeps."""
    first = (str(error).splitlines() or [""])[0]
    return first if len(first) <= MAX_SHOWN else f"{first[:MAX_SHOWN]} ..."


def together(names: Sequence[str]) -> str:
    """Several names as in a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def check_parts(given: Sequence[Any], method: str, argument: str, example: str) -> list[Any]:
    """Return the parts as a list.

    Raises:
        TypeError: one of them lacks the method, for instance because it is a class and not an object.
    """
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a list such as [{example}()], got {describe(given)} alone.")
    for part in given:
        if isinstance(part, type) or not callable(getattr(part, method, None)):
            hint = f" Write {part.__name__}() with parentheses." if isinstance(part, type) else ""
            raise TypeError(
                f"{argument} must hold objects with the method {method}, such as {example}(), got {describe(part)}.{hint}"
            )
    return list(given)


def check_steps(every: object, planned_steps: int | None) -> None:
    """Accept numbers of steps.

    Raises:
        TypeError: no number.
        ValueError: out of range.
    """
    if not isinstance(every, int):
        raise TypeError(f"every must be a number of steps, an int, got {describe(every)}.")
    if every < 1 or (planned_steps is not None and planned_steps < 1):
        raise ValueError(f"every and planned_steps must be at least 1, got every={every}, {planned_steps=}.")


def check_finding(found: object) -> Finding:
    """Return what is a finding.

    Raises:
        TypeError: it is none, or its texts are none.
    """
    if not isinstance(found, Finding):
        raise TypeError(f"A finding must be a Finding, got {describe(found)}.")
    if not (isinstance(found.message, str) and isinstance(found.advice, str)):
        raise TypeError(
            f"The message and the advice of a finding must be text, got {found.message!r}, {found.advice!r}."
        )
    return found


def describe(value: object) -> str:
    """Name a value's type for an error message."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"
