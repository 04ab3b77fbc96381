"""What our own tests use and users' tests may use: made-up records, replay of a watch, and assertions on models."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding, Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stethoscope._protocols import Watch


def series(steps: Iterable[int] | None = None, **values_by_name: Sequence[float | None]) -> list[Record]:
    """Make the records of a run out of plain lists.

    Args:
        steps: the steps, one per value; 0, 1, 2 ... by default.
        **values_by_name: record name to its values. A name with a slash counts as a probe's, any other as the step's.

    Returns:
        Records ordered by step, then in the order of the arguments.

    Raises:
        ValueError: the lists differ in length.

    Example:
        >>> [record.value for record in series(loss=[2.0, 1.0])]
        [2.0, 1.0]
    """
    lengths = {name: len(values) for name, values in values_by_name.items()}
    at = list(steps) if steps is not None else list(range(max(lengths.values(), default=0)))
    if any(length != len(at) for length in lengths.values()):
        raise ValueError(f"All lists must be as long as the steps: {len(at)} steps, lengths {lengths}.")
    return [
        Record(name, None if values[i] is None else values[i], step, source="probe" if "/" in name else "step")
        for i, step in enumerate(at)
        for name, values in values_by_name.items()
    ]


def replay(watch: Watch, records: Iterable[Record]) -> list[Finding]:
    """Run a watch over recorded history, as the monitor would have: what belongs together arrives together.

    Args:
        watch: any watch.
        records: in the order of their delivery; neighbours with the same step and phase that are either all logged or
            all not logged form one delivery.

    Returns:
        All findings, in order.
    """
    state = watch.init()
    found: list[Finding] = []
    for _, together in groupby(records, key=lambda record: (record.step, record.phase, record.source == "log")):
        state, findings = watch.update(state, tuple(together))
        found += findings
    return found


def assert_causal(model: Any, x: Any, allowed: int = 0, **options: Any) -> None:
    """Fail unless the model looks ahead by at most `allowed` input steps and nothing leaks across the batch.

    Args:
        model: see `stethoscope.audits.causality`.
        x: the same; a batch of two or more.
        allowed: declared look-ahead in input steps.
        **options: further arguments of `stethoscope.audits.causality`, e.g. `time_axis=1` or `modes=("eval",)`.

    Raises:
        AssertionError: with the whole report as its message.

    Example:
        >>> import torch
        >>> assert_causal(lambda x: x.cumsum(-1), torch.randn(2, 50))
    """
    from stethoscope.audits import causality

    report = causality(model, x, allowed=allowed, **options)
    if not report.ok:
        raise AssertionError(str(report))
