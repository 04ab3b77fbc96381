"""What the causality audit returns, in numbers, words and a picture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stethoscope._record import Finding, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope.audits._causality._accuse import Culprit


@dataclass(frozen=True, kw_only=True)
class ModeVerdict:
    """What was found in one mode.

    Args:
        lookahead: largest look-ahead, in input steps.
        allowed: look-ahead that was declared.
        culprit: module that breaks causality, `""` for the root's own forward; None where none does or is known.
        batch_leak: whether an item of the batch changes the outputs of another.
        padding_leak: whether steps beyond `lengths` change outputs before; None where it was not examined.
        where: `"nowhere"`, `"everywhere"`, `"at the start"` or `"at block edges"` (at some steps only).
        position: input step whose change moves the output furthest ahead of it.
        moved_from: input step of that output.
        size: largest change of an earlier output, relative to the largest change that the perturbation causes.
        output_size: the same change, relative to the rms of the output.
        dtype: type in which it was decided.
        tolerance: relative change up to which an output counts as unmoved.
        examined: input steps that were perturbed.
        passes: forward passes spent.
        nan_leak: whether NaN from `position` on reaches earlier outputs; None where it was not tried.
        gradient_leak: whether gradients of earlier outputs reach inputs from `position` on; None where not tried.
        notes: what a reader should know about how it was decided.
        picture: rows of `(input step, output step moved or not)`, one input step changed at a time.
        blame: the culprit in detail.
    """

    lookahead: int = 0
    allowed: int = 0
    culprit: str | None = None
    batch_leak: bool = False
    padding_leak: bool | None = None
    where: str = "nowhere"
    position: int | None = None
    moved_from: int | None = None
    size: float = 0.0
    output_size: float = 0.0
    dtype: str = "float32"
    tolerance: float = 0.0
    examined: int = 0
    passes: int = 0
    nan_leak: bool | None = None
    gradient_leak: bool | None = None
    notes: tuple[str, ...] = ()
    picture: tuple[tuple[int, tuple[bool, ...]], ...] = ()
    blame: Culprit | None = None
    batch_blame: Culprit | None = None

    @property
    def causal(self) -> bool:
        """Whether there is no look-ahead at all."""
        return self.lookahead == 0

    @property
    def ok(self) -> bool:
        """Whether the look-ahead is allowed and nothing leaks across the batch or from padding."""
        return self.lookahead <= self.allowed and not self.batch_leak and not self.padding_leak


@dataclass(frozen=True, kw_only=True)
class CausalityReport(Report):
    """What `causality` found.

    Args:
        lookahead: largest look-ahead over all modes, in input steps.
        culprit: module that breaks causality, `""` for the root's own forward; None where none does or is known.
        batch_leak: whether an item of the batch changes the outputs of another.
        per_mode: verdict per mode.
        steps: input steps of `x`.
        sample_rate: input steps per second, None where not given.
        passes: forward passes spent.
    """

    lookahead: int = 0
    culprit: str | None = None
    batch_leak: bool = False
    per_mode: dict[str, ModeVerdict] = field(default_factory=dict[str, ModeVerdict])
    steps: int = 0
    sample_rate: float | None = None
    passes: int = 0

    @property
    def causal(self) -> bool:
        """Whether there is no look-ahead at all, in any mode."""
        return self.lookahead == 0

    @property
    def ok(self) -> bool:
        """Whether, in every mode, the look-ahead is allowed and nothing leaks across the batch or from padding."""
        return all(verdict.ok for verdict in self.per_mode.values())

    @property
    def lookahead_ms(self) -> float | None:
        """The look-ahead in milliseconds, where `sample_rate` was given."""
        return None if self.sample_rate is None else 1000 * self.lookahead / self.sample_rate

    def plot(self, mode: str | None = None, width: int = 60) -> str:
        """Draw which output steps move when one input step moves, as text.

        Args:
            mode: which mode; by default the one that looks ahead furthest.
            width: characters per row.

        Returns:
            One row per input step that was changed alone: `|` is that step, `#` an output that moves, `!` an output
            that moves although it comes earlier, `.` an output that stays.
        """
        chosen = mode or max(
            self.per_mode, key=lambda name: (self.per_mode[name].lookahead, len(self.per_mode[name].picture))
        )
        rows = self.per_mode[chosen].picture
        lines = []
        for step, moved in rows:
            here = min(width - 1, step * width // self.steps)
            cells = []
            for cell in range(width):
                low, high = (
                    cell * len(moved) // width,
                    max((cell + 1) * len(moved) // width, cell * len(moved) // width + 1),
                )
                on = any(moved[low:high])
                cells.append("." if not on else "!" if cell < here else "#")
            if cells[here] == ".":
                cells[here] = "|"
            lines.append(f"{step:>8} {''.join(cells)}")
        return "\n".join(lines)


def report(
    name: str,
    per_mode: dict[str, ModeVerdict],
    distinct: Sequence[str],
    notes: Sequence[str],
    steps: int,
    sample_rate: float | None,
    passes: int,
) -> CausalityReport:
    """Put the verdicts of the modes that were `distinct` into words."""
    worst = max(per_mode.values(), key=lambda verdict: verdict.lookahead)
    culprit = next((v.culprit for v in (worst, *per_mode.values()) if v.culprit is not None), None)
    findings = [f for mode in distinct for f in _findings(mode, per_mode[mode], steps, sample_rate)]
    lines = [f"{mode}: {_sentence(per_mode[mode], steps, sample_rate)}" for mode in distinct]
    lines += [f"{mode}: {note}" for mode in distinct for note in per_mode[mode].notes]
    lines += list(notes)
    lines.append(f"cost: {passes} forward passes")
    made = CausalityReport(
        title=f"causality of {name}, {steps} input steps",
        findings=tuple(findings),
        lookahead=worst.lookahead,
        culprit=culprit,
        batch_leak=any(verdict.batch_leak for verdict in per_mode.values()),
        per_mode=per_mode,
        steps=steps,
        sample_rate=sample_rate,
        passes=passes,
    )
    if not made.ok and worst.picture:
        lines += ["outputs that move (# in time, ! too early) when one input step (left) moves:", made.plot()]
    return replace(made, summary="\n".join(lines))


def _amount(ahead: int, steps: int, sample_rate: float | None) -> str:
    more = [f"{1000 * ahead / sample_rate:g} ms"] if sample_rate is not None else []
    if ahead > 0 and ahead >= 0.95 * (steps - 1):
        more.append("all of x, the true one may be longer")
    return f"{ahead} input steps" + (f" ({'; '.join(more)})" if more else "")


def _sentence(verdict: ModeVerdict, steps: int, sample_rate: float | None) -> str:
    decided = f"{verdict.examined} of {steps - 1} positions, {verdict.dtype}, {verdict.passes} passes"
    if verdict.causal:
        return f"causal ({decided})"
    return f"look-ahead {_amount(verdict.lookahead, steps, sample_rate)}, {verdict.where if verdict.lookahead > verdict.allowed else 'allowed'} ({decided})"


def _findings(mode: str, verdict: ModeVerdict, steps: int, sample_rate: float | None) -> list[Finding]:
    found = []
    if verdict.lookahead > verdict.allowed:
        blame = verdict.blame
        who = f" {blame}" if blame is not None else ""
        found.append(
            Finding(
                code="causality-leak",
                severity="error",
                message=(
                    f"In {mode} mode the output looks ahead by {_amount(verdict.lookahead, steps, sample_rate)}, {verdict.where}; {verdict.allowed} allowed. "
                    f"Changing the input from step {verdict.position} on moves the output at step {verdict.moved_from}, by {verdict.output_size:.1e} of the "
                    f"output's rms ({verdict.size:.1e} of the largest change).{who}"
                ),
                advice=blame.advice
                if blame is not None
                else "Compute each output step from inputs up to that step only.",
                module=(blame.module or "") if blame is not None else "",
                phase=mode,
                evidence={
                    "lookahead": verdict.lookahead,
                    "allowed": verdict.allowed,
                    "position": verdict.position,
                    "moved_from": verdict.moved_from,
                    "where": verdict.where,
                    "size": verdict.size,
                    "output_size": verdict.output_size,
                    "dtype": verdict.dtype,
                    "tolerance": verdict.tolerance,
                    "nan_leak": verdict.nan_leak,
                    "gradient_leak": verdict.gradient_leak,
                    **({} if blame is None else blame.evidence()),
                },
            )
        )
    if verdict.batch_leak:
        blame = verdict.batch_blame
        who = f" {blame}" if blame is not None else ""
        found.append(
            Finding(
                code="batch-leak",
                severity="error",
                message=f"In {mode} mode the outputs of one item change when only another item of the batch changes.{who}",
                advice=blame.advice
                if blame is not None
                else "Look for statistics over axis 0: BatchNorm, a mean or a maximum without dim=.",
                module=(blame.module or "") if blame is not None else "",
                phase=mode,
                evidence={} if blame is None else blame.evidence(),
            )
        )
    if verdict.padding_leak:
        found.append(
            Finding(
                code="padding-leak",
                severity="warning",
                message=f"In {mode} mode outputs within `lengths` change when only the padding beyond `lengths` changes.",
                advice="Mask the padding before anything that looks across time: convolutions, norms, attention, pooling.",
                phase=mode,
            )
        )
    return found
