"""Repeats a step under the audit: its outermost calls one by one, or its batches by the user's own function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from stethoscope.audits._nonfinite import examine
from stethoscope.audits._nonfinite_run import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from stethoscope.audits._nonfinite import NonFiniteReport
    from stethoscope.audits._nonfinite_call import Call


def repeat_calls(model: nn.Module, calls: Sequence[Call]) -> NonFiniteReport | None:
    """Return the first report that finds something, else the last one; None without calls.

    First all forward passes; then the backward passes, from the finite gradients that the outputs were handed.
    """
    report: NonFiniteReport | None = None
    for call in calls:
        with call.modes():
            report = examine(call.forward(model))
        if not report.ok:
            return report
    for call in calls:
        if call.grad_outputs:
            with call.modes(), torch.enable_grad():
                backward = examine(call.backward(model))
            if not backward.ok:
                return backward
    return report


def repeat_batches(
    model: nn.Module,
    replay: Callable[..., Any],
    batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    calls: Sequence[Call],
) -> NonFiniteReport | None:
    """Do the same with a function that runs a micro-batch and returns its loss, from arguments given one by one.

    Each begins with the random state of its first call, where the calls divide evenly among the batches.
    """
    report: NonFiniteReport | None = None
    share = 0 if len(calls) % len(batches) else len(calls) // len(batches)
    for i, (args, kwargs) in enumerate(batches):
        random = calls[i * share].random if share else None
        if random is not None:
            random.put()
        with torch.enable_grad():
            report = examine(Task(model, replay, args, kwargs, loss=_itself, whole=True))
        if not report.ok:
            return report
    return report


def _itself(loss: Any) -> Any:
    return loss
