"""What our own tests use and users' tests may use: made-up records, replay of a watch, and assertions on models."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stethoscope._record import Finding, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn

    from stethoscope._protocols import Probe, Watch
    from stethoscope.watches import MetricSchema


def series(steps: Iterable[int] | None = None, **values_by_name: Sequence[float | None]) -> list[Record]:
    """Make the records of a run out of plain lists.

    Args:
        steps: the steps, one per value; 0, 1, 2 ... by default.
        **values_by_name: record name to its values. A name with a slash counts as a probe's, any other as the step's.

    Returns:
        Records ordered by step, then in the order of the arguments.

    Raises:
        ValueError: the lists differ in length.

    Examples:
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


def assert_no_sync(probe: Probe, model: nn.Module, x: object, given: Mapping[str, Tensor] | None = None) -> None:
    """Check that a probe never waits for the device: run it on the meta device, where every such operation raises.

    Operations whose result has a fixed shape but that still synchronise on CUDA are not seen (such as `histc` without
    a range); `torch.cuda.set_sync_debug_mode("error")` sees those.

    Args:
        probe: the probe.
        model: runs forward on `x` and, where its output has a gradient, backward; a copy of it is moved to meta.
        x: one argument of the model, a tensor or nested tensors.
        given: what `Monitor.observe` would have been given.

    Raises:
        AssertionError: the probe read a value, or it measured nothing.

    Examples:
        >>> from torch import nn, ones
        >>> from stethoscope.probes import Activations
        >>> assert_no_sync(Activations(), nn.Linear(4, 2), ones(8, 4))
    """
    import copy

    from torch.utils._pytree import tree_map_only

    from stethoscope._tree import tensors

    copied = copy.deepcopy(model).to("meta").train()
    attachment = probe.attach(copied)
    try:
        for _ in range(2):
            attachment.arm(True, "train")
            outputs = [out for _, out in tensors(copied(tree_map_only(Tensor, lambda t: t.to("meta"), x)))]
            total = sum(out.abs().sum() for out in outputs if out.requires_grad)
            if isinstance(total, Tensor):
                total.backward()  # type: ignore[no-untyped-call]
            moved = {name: tensor.to("meta") for name, tensor in (given or {}).items()}
            readings = attachment.read(moved)
            assert len(readings), f"{probe!r} has read nothing."
            for key in readings:
                assert readings[key].is_meta, f"{key} has left the device."
    except (NotImplementedError, RuntimeError) as error:
        raise AssertionError(f"{probe!r} waits for the device: {error}") from error
    finally:
        attachment.detach()


def assert_metrics(step: Callable[[Any], object], batch: Any, schema: MetricSchema, phase: str = "train") -> None:
    """Fail unless the metrics of one batch fit their declaration.

    Args:
        step: called with `batch`; returns a metric dictionary as `Monitor.log` takes it.
        batch: one batch.
        schema: what is declared.
        phase: the phase that the step stands for.

    Raises:
        AssertionError: it does not fit; the message lists every finding of severity warning and error.

    Examples:
        >>> from stethoscope.watches import MetricSchema
        >>> assert_metrics(lambda batch: {"loss": sum(batch)}, [1.0, 2.0], MetricSchema({"loss": float}))
    """
    report = schema.judge(step(batch), phase)
    if not report.ok:
        raise AssertionError(str(report))


def assert_causal(model: Any, x: Any, allowed: int = 0, **options: Any) -> None:
    """Fail unless the model looks ahead by at most `allowed` input steps and nothing leaks across the batch.

    Args:
        model: see `stethoscope.audits.causality`.
        x: the same; a batch of two or more.
        allowed: declared look-ahead in input steps.
        **options: further arguments of `stethoscope.audits.causality`, e.g. `time_axis=1` or `modes=("eval",)`.

    Raises:
        AssertionError: with the whole report as its message.

    Examples:
        >>> import torch
        >>> assert_causal(lambda x: x.cumsum(-1), torch.randn(2, 50))
    """
    from stethoscope.audits import causality

    report = causality(model, x, allowed=allowed, **options)
    if not report.ok:
        raise AssertionError(str(report))
