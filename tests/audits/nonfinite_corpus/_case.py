"""What a case of the corpus is: a run that can be made again and again, and what is true of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Run:
    """One forward pass, with `loss` also a backward pass, inside of `context()`."""

    model: nn.Module
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], torch.Tensor] | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Truth:
    """What the audit must say; None or empty: left open, since it says nothing about the fault.

    Several names, separated by `|`, are equally right: one mistake can be told by the line that makes a zero
    denominator and by the line that divides.
    """

    origin: str
    module: str | None = None
    operation: str = ""  # as in `aten.div`, without the prefix and without a trailing underscore
    line: str = ""  # part of the guilty line of code
    parameter: str | None = None
    samples: tuple[int, ...] | None = None
    call: int | None = None
    first_inf: str | None = None  # the module; "-" for none
    first_nan: str | None = None

    def wrong(self, report: Any) -> str:
        """The first thing that a report says otherwise, or the empty string."""
        told = {
            "origin": (self.origin, report.origin),
            "module": (self.module, report.module),
            "operation": (self.operation or None, (report.operation or "").removeprefix("aten.").rstrip("_")),
            "parameter": (self.parameter, report.parameter),
            "samples": (self.samples, tuple(report.samples or ())),
            "call": (self.call, report.call_index),
            "first_inf": (self.first_inf, report.first_inf.module if report.first_inf else "-"),
            "first_nan": (self.first_nan, report.first_nan.module if report.first_nan else "-"),
        }
        for name, (true, said) in told.items():
            right = true is None or (said in true.split("|") if isinstance(true, str) else said == true)
            if not right:
                return f"{name}: {said!r}, not {true!r}"
        if self.line and not any(part in (report.source or "") for part in self.line.split("|")):
            return f"line: {report.source!r}, not {self.line!r}"
        return ""


@dataclass(frozen=True)
class Case:
    """A named run. `truth` is None when it is healthy."""

    name: str
    build: Callable[[], Run]
    truth: Truth | None

    def __call__(self) -> Run:
        torch.manual_seed(0)
        return self.build()


def fault(origin: str, module: str | None = None, operation: str = "", line: str = "", **more: Any):
    """Makes a case of the function that it decorates."""

    def case(build: Callable[[], Run]) -> Case:
        return Case(build.__name__.replace("_", " "), build, Truth(origin, module, operation, line, **more))

    return case


def healthy(build: Callable[[], Run]) -> Case:
    """A run in which nothing is wrong, however it looks."""
    return Case(build.__name__.replace("_", " "), build, None)


def cases(namespace: Mapping[str, Any]) -> list[Case]:
    return [value for value in namespace.values() if isinstance(value, Case)]
