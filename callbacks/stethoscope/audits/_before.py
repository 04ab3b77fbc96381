"""All that can be said before a run, in one call: what integrations use at the start of fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stethoscope._record import Report
from stethoscope._tree import tensors
from stethoscope.audits._audio import audio
from stethoscope.audits._checkpoint import checkpoint as audit_checkpoint
from stethoscope.audits._plan import plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from stethoscope._record import JSON
    from stethoscope._schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class BeforeReport(Report):
    """The findings of several audits together.

    Args:
        reports: the single reports, in the order checkpoint, audio, plans.
    """

    reports: tuple[Report, ...] = ()


def before(
    model: nn.Module | None = None,
    *,
    checkpoint: Mapping[str, Any] | str | Path | None = None,
    config: Mapping[str, JSON] | None = None,
    partial: Sequence[str] = (),
    batch: Any = None,
    sample_rate: int | None = None,
    channels: int = 1,
    schedules: Sequence[Schedule] = (),
    planned_steps: float | None = None,
) -> BeforeReport:
    """Run the audits that the arguments allow.

    **Decides** nothing of its own: see `audits.checkpoint` (with a checkpoint), `audits.audio` (with a batch and a sample rate; the
    first floating-point tensor in the batch is taken for audio), `audits.plan` (with schedules and planned steps).
    The summary names what was given and could not be examined.
    **Cost:** that of the audits.

    Args:
        model: that is to be trained.
        checkpoint: that it is to start from.
        config: facts about the model, see `audits.checkpoint`.
        partial: what is left out on purpose, see `audits.checkpoint`.
        batch: one of the loader.
        sample_rate: Hz.
        channels: that the model takes.
        schedules: what is to happen when.
        planned_steps: optimizer steps of the run; negative or infinite for no end.

    Examples:
        >>> from stethoscope.audits import Schedule, before
        >>> report = before(schedules=[Schedule("sparsify", 2500, 8000, 50)], planned_steps=1200)
        >>> [finding.code for finding in report.findings]
        ['schedule-unreachable']
    """
    reports: list[Report] = []
    idle: list[str] = []
    if checkpoint is not None:
        reports.append(audit_checkpoint(model, checkpoint, config=config, partial=partial))
    if batch is not None and sample_rate is not None:
        waves = next((x for _, x in tensors(batch) if x.is_floating_point() and x.dim()), None)
        if waves is not None:
            reports.append(audio(waves, sample_rate=sample_rate, channels=channels))
        else:
            idle.append("audio: not examined, the batch holds no floating-point tensor")
    elif batch is not None:
        idle.append("audio: not examined without sample_rate")
    if planned_steps is None and schedules:
        idle.append("schedules: not examined without planned_steps")
    if planned_steps is not None:
        steps = planned_steps if planned_steps >= 0 else float("inf")
        reports += [plan(schedule, steps) for schedule in schedules]
    return BeforeReport(
        title="before the run",
        summary="\n".join([*(f"{report.title}: {'ok' if report.ok else 'not ok'}" for report in reports), *idle]),
        findings=tuple(finding for report in reports for finding in report.findings),
        reports=tuple(reports),
    )
