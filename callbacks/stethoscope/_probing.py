"""The probes of one monitor at work: attached, armed, read, and taken off when they fail."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from stethoscope._inventory import Inventory
from stethoscope._overhead import Pace
from stethoscope._parts import Notes, by_severity, check_finding, describe, from_preset, mark_preset, together
from stethoscope._protocols import Key, Readings
from stethoscope._record import Finding, Record
from stethoscope._secrets import trace_of
from stethoscope._transfer import Part
from stethoscope.probes._compiled import anything_compiled, next_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from stethoscope._protocols import Attachment, Probe, Watch
    from stethoscope._record import Severity

log = logging.getLogger("stethoscope")


@dataclass(eq=False)
class _Attached:
    """A probe at work."""

    probe: Probe
    attachment: Attachment
    every: int
    stand_ins: list[_Attached] = field(
        default_factory=list["_Attached"]
    )  # those that record the same when they are due
    armed: bool = False
    ever_read: bool = False
    waited: bool = False
    judged: bool = False


class Probing:
    """Arms and reads probes.

    Args:
        model: unwrapped.
        probes: to attach.
        every: for probes that do not say.
        notes: where to say what went wrong.
        overhead: share of the training's time that they may take; None for no limit.

    Raises:
        Exception: whatever `attach` raises; nothing stays attached.
    """

    def __init__(
        self, model: nn.Module, probes: Sequence[Probe], every: int, notes: Notes, overhead: float | None = None
    ) -> None:
        self._model, self._notes, self._every = model, notes, every
        self._thread, self._inventory = get_ident(), Inventory(model)
        self._attached: list[_Attached] = []
        try:
            for probe in probes:
                attached = _Attached(probe, probe.attach(model), probe.every or every)
                attached.stand_ins = [
                    each for each in self._attached if _covers(each.probe, attached.every, probe, attached.every)
                ]
                self._attached.append(attached)
        except BaseException:
            self.detach()
            raise
        for attached in list(self._attached):
            self._take_notes(attached)
        device = next((each.device for each in model.parameters()), torch.device("cpu"))
        intervals = [attached.every for attached in self._attached]
        self._pace = None if overhead is None else Pace(overhead, intervals, device)

    def arm(self, step: int, phase: str) -> None:
        """Arm what is due at the step under way and disarm the rest; outside of training, arm everything."""
        training = phase == "train"
        for attached in list(self._attached):
            due = self._due(attached, step, phase)
            if due or attached.armed or not training:
                self._guarded(attached, _arming(attached.attachment, due, phase))
            attached.armed = due

    def _due(self, attached: _Attached, step: int, phase: str) -> bool:
        if any(each in self._attached and self._due(each, step, phase) for each in attached.stand_ins):
            return False
        if phase != "train":
            return True
        if self._pace is None:
            return step % attached.every == 0
        return self._pace.due(step, attached.every)

    def read(self, given: Mapping[str, Tensor], stamp: Record) -> list[Part]:
        """Read everything that is armed."""
        parts: list[Part] = []
        idle: list[Probe] = []
        for attached in [each for each in self._attached if each.armed]:
            readings = self._guarded(attached, _reading(attached.attachment, given))
            if attached not in self._attached:
                continue  # it has failed
            if readings:
                parts.append(Part(readings, stamp))
            if stamp.phase == "train" and self._is_idle(attached, read=bool(readings)):
                idle.append(attached.probe)
            self._take_notes(attached)
        if idle:
            self._tell(idle, stamp.step)
        return parts

    def lap(self, step: int) -> None:
        """Close a step: look at what it took, where there is a limit."""
        self._notes.pending += [*next_turn(step), *self._inventory.compare(step)]
        if self._pace is not None:
            self._pace.lap(step)

    def interrupt(self) -> None:
        """Leave the step under way out of the measurement: something other than training is in it."""
        if self._pace is not None:
            self._pace.interrupt()

    def overhead(self, step: int) -> dict[str, float]:
        """Return what observing takes now, once known, at steps where statistics are due."""
        if self._pace is None or self._pace.share is None or step % (self._every * self._pace.stretch):
            return {}
        return {"overhead/share": self._pace.share, "overhead/every": float(self._every * self._pace.stretch)}

    def detach(self) -> None:
        """Remove every hook."""
        for attached in self._attached:
            try:
                attached.attachment.detach()
            except Exception as error:
                self._notes.disabled(attached.probe, "probe", error)
        self._attached.clear()

    def _guarded(self, attached: _Attached, call: Callable[[], Any]) -> Any:
        """Call into a probe; if it fails, it is taken off and reported."""
        try:
            return call()
        except Exception as error:
            self._attached.remove(attached)
            try:
                attached.attachment.detach()
            except Exception as second:
                log.error(  # noqa: TRY400 - that would write the traceback as it is
                    "Detaching %s failed as well.\n%s", type(attached.probe).__name__, trace_of(second)
                )
            self._notes.disabled(attached.probe, "probe", error)
            return None

    def _take_notes(self, attached: _Attached) -> None:
        # notes are an offer of the protocol, not a duty
        taken: list[Finding] = self._guarded(attached, _noting(attached.attachment)) or []
        if from_preset(attached.probe):
            # nobody asked for the probe; what can only be a mistake of the script is told all the same
            taken = [note if note.evidence.get("certain") else replace(note, severity="info") for note in taken]
        self._notes.pending += taken

    @staticmethod
    def _is_idle(attached: _Attached, *, read: bool) -> bool:
        """Whether it is now clear that a probe reads nothing; said once."""
        attached.ever_read |= read
        if attached.judged or attached.ever_read:
            return False
        if anything_compiled() and not attached.waited:
            attached.waited = True  # the step in which something is compiled first is not the rule
            return False
        attached.judged = True
        return True

    def _tell(self, idle: Sequence[Probe], step: int) -> None:
        own = get_ident() == self._thread
        groups: Mapping[Severity, Sequence[Probe]] = by_severity(idle) if own else {"warning": idle}
        for severity, those in groups.items():
            names = [type(probe).__name__ for probe in those]
            self._notes.pending.append(
                Finding(
                    "probe-read-nothing",
                    severity,
                    f"Step {step} has shown nothing to {together(names)}.",
                    self._advice(),
                    step,
                    evidence={"probes": names},
                )
            )

    def _advice(self) -> str:
        """What may be done about a probe that has read nothing."""
        if get_ident() != self._thread:
            return (
                "Create the monitor on the thread that trains: step() is called on another one than the one that has created "
                "it, and what modules do there is not read."
            )
        if not self._model.training:
            return (
                "Call model.train() before training: the model is in eval mode, and outside of phase blocks only training "
                "is recorded."
            )
        if anything_compiled():
            return (
                "Modules inside of torch.compile call no hooks. Activations with `every` above 1, as in presets.first_aid(), "
                "is read all the same, since steps that it observes run eagerly, unless a torch.compiler.set_stance of the script's "
                "own is in force."
            )
        return (
            "Give step() the tensors that they ask for, such as step(loss=loss, outputs=..., targets=...), where this training has them; check include "
            "and exclude patterns. Modules must run on the thread that created the monitor."
        )


def with_needs(probes: Sequence[Probe], watches: Sequence[Watch], every: int) -> list[Probe]:
    """Return the probes given, and those that watches need and that none of them covers at the monitor's `every`."""
    at_work = list(probes)
    for watch in watches:
        for need in watch.needs:
            if not any(_covers(probe, probe.every or every, need, need.every or every) for probe in at_work):
                if from_preset(watch):
                    mark_preset(need)
                at_work.append(need)
    return at_work


def _covers(probe: Probe, every: int, other: Probe, others: int) -> bool:
    """Whether `probe`, looking at every `every`th step, would cover `other`, looking at every `others`th."""
    if probe == other and every == others:
        return True
    if not all(is_dataclass(each) and not isinstance(each, type) for each in (probe, other)):
        return False
    own, asked = (replace(cast("Any", spec), every=interval) for spec, interval in ((probe, every), (other, others)))
    return bool(own.covers(asked))


def unused() -> Finding:
    """What to say of a monitor that was given nothing."""
    return Finding(
        "probe-read-nothing",
        "warning",
        "Nothing was recorded: the monitor was closed before the first step() or log().",
        "Call monitor.step(loss=loss) in the loop, after optimizer.step().",
        evidence={"probe": "Monitor"},
    )


def _arming(attachment: Attachment, on: bool, phase: str) -> Callable[[], None]:
    return lambda: attachment.arm(on, phase)


def _reading(attachment: Attachment, given: Mapping[str, Tensor]) -> Callable[[], Mapping[Key, Tensor]]:
    def read() -> Mapping[Key, Tensor]:
        readings = attachment.read(given)
        if isinstance(readings, Readings):
            return readings
        if not isinstance(readings, Mapping):
            raise TypeError(f"read() must return a mapping of Key to tensor, got {describe(readings)}.")
        for key, tensor in readings.items():
            if not (isinstance(key, Key) and isinstance(tensor, Tensor)):
                raise TypeError(f"read() must return tensors by Key, got {describe(tensor)} by {key!r}.")
        return readings

    return read


def _noting(attachment: Attachment) -> Callable[[], list[Finding]]:
    def take() -> list[Finding]:
        notes: list[Finding] = getattr(attachment, "notes", [])
        taken = [check_finding(note) for note in notes]
        if taken:
            notes.clear()
        return taken

    return take
