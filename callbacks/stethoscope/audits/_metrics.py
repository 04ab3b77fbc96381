"""One batch of training and one of validation, before the training: do their metrics agree?"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stethoscope._metrics import normalise
from stethoscope._record import Finding, Record, Report
from stethoscope.audits._untouched import untouched
from stethoscope.watches import MetricSchema
from stethoscope.watches._metric_names import loss, nearest, rate
from stethoscope.watches._metric_ranks import rank_differences

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

CODE = Path(torch.__file__).parent


@dataclass(frozen=True, kw_only=True)
class MetricsReport(Report):
    """What `audits.metrics` returns.

    Args:
        train: the metrics of the training step, name to kind (see `Monitor.log`).
        val: those of the validation step.
        schema: the schema given, with what it has learned here. `report.schema.write_lock("schema.lock.json")` keeps
        it.
    """

    train: Mapping[str, str] = field(default_factory=dict[str, str])
    val: Mapping[str, str] = field(default_factory=dict[str, str])
    schema: MetricSchema = field(default_factory=MetricSchema)


def metrics(
    train_step: Callable[[Any], object],
    val_step: Callable[[Any], object],
    train_batch: Any,
    val_batch: Any,
    schema: MetricSchema | None = None,
) -> MetricsReport:
    """Run one batch of both phases and compare the metrics, so that a KeyError comes now and not after an epoch.

    Validation runs under `torch.no_grad()` with all modules in eval mode. Where a model returns a plain dictionary,
    reads of keys that it does not hold are noticed, also those that a default (`.get("th_accuracy", 0.0)`) would hide.
    Parameters, buffers, gradients, training flags, optimizer states and random states are put back afterwards, also
    after an exception, as far as they are reached through closures, bound objects and globals of the two functions. An
    exception of a step becomes a finding.

    Under `torch.distributed` the names are gathered from all ranks once, so call it on every rank or on none.

    Args:
        train_step: called with `train_batch`; returns the metrics as `Monitor.log` takes them. Leave the optimizer out.
        val_step: the same for validation.
        train_batch: one batch.
        val_batch: one batch.
        schema: what is declared; None compares the two phases with one another. A lock file that it names
            and that does not exist yet is written, unless something was found.

    Examples:
        >>> report = metrics(lambda x: {"loss": x, "th_accuracy": 0.5}, lambda x: {"loss": x}, 1.0, 2.0)
        >>> report.ok, report.findings[0].code, report.findings[0].evidence["metric"]
        (False, 'metric-phase-mismatch', 'th_accuracy')
    """
    schema = schema if schema is not None else MetricSchema()
    found: list[Finding] = []
    state, kinds = schema.init(), {"train": {}, "val": {}}  # type: dict[str, Any], dict[str, dict[str, str]]
    with untouched(train_step, val_step) as models:
        for phase, step, batch in (("train", train_step, train_batch), ("val", val_step, val_batch)):
            asked = _Asked()
            records, failure = _run(phase, step, batch, models, asked, list(kinds["train"]))
            if failure is not None:
                found.append(failure)
            found += [_defaulted(phase, key, asked.given) for key in asked.defaulted]
            kinds[phase] = {record.name: record.kind for record in records}
            state, said = schema.update(state, records)
            # A training step returns a loss to call backward on: its graph is no fault.
            found += [finding for finding in said if finding.code != "metric-grad" or phase != "train"]
            if failure is None and not records:
                found.append(_empty(phase))
    found += rank_differences(_gathered(kinds))
    learned = schema.locked(state)
    if not found and schema.lock is not None and not Path(schema.lock).exists() and learned.declared:
        learned.write_lock()
    lines = [f"{phase}: {', '.join(names) or 'nothing'}" for phase, names in kinds.items()]
    return MetricsReport(
        title="metrics of train and val",
        summary="\n".join(lines),
        findings=tuple(found),
        train=kinds["train"],
        val=kinds["val"],
        schema=learned,
    )


def _run(
    phase: str, step: Callable[[Any], object], batch: Any, models: list[nn.Module], asked: _Asked, known: list[str]
) -> tuple[list[Record], Finding | None]:
    with ExitStack() as stack:
        if phase == "val":
            stack.enter_context(torch.no_grad())
            for model in models:
                model.eval()
        for model in models:
            stack.callback(model.register_forward_hook(asked.hook).remove)
        try:
            flat = normalise(step(batch))
        except Exception as error:  # whatever a step raises is what this audit reports
            return [], _failed(phase, error, asked, known, batch)
    return [
        Record(name, None if value is None else float(value), 0, phase=phase, source="log", kind=kind)
        for name, value, kind in flat
    ], None


class _Asked:
    """Hears which keys are asked of the dictionaries that models return, and are not in there."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.defaulted: list[str] = []
        self.missed: list[str] = []

    def hook(self, _module: nn.Module, _args: object, output: object) -> object:
        if type(output) is not dict:
            return None
        self.given += [key for key in output if isinstance(key, str) and key not in self.given]
        return _Heard(output, self)


class _Heard(dict[Any, Any]):
    def __init__(self, held: dict[Any, Any], asked: _Asked) -> None:
        super().__init__(held)
        self._asked = asked

    def __missing__(self, key: Any) -> Any:
        self._asked.missed.append(key)
        raise KeyError(key)

    def get(self, key: Any, default: Any = None, /) -> Any:
        if key not in self and default is not None and isinstance(key, str) and key not in self._asked.defaulted:
            self._asked.defaulted.append(key)
        return super().get(key, default)


def _failed(phase: str, error: Exception, asked: _Asked, known: list[str], batch: Any) -> Finding:
    """Say what an exception of a step means for its metrics."""
    given = asked.given or known
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if CODE not in Path(frame.filename).parents]
    frames = [frame for frame in frames if frame.filename != __file__]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    line = frames[-1].line or "" if frames else ""
    evidence = {"exception": f"{type(error).__name__}: {error}", "where": where, "line": line, "given": given}
    at = f" ({': '.join(part for part in (where, line) if part)})" if where else ""
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    # Any dictionary can lack a key; a batch that does is not what is looked for.
    unclear = not asked.given and not isinstance(batch, Mapping)
    if isinstance(key, str) and (key in asked.missed or key in known or unclear or rate(key) or loss(key)):
        meant = nearest(key, given)
        return Finding(
            "metric-missing",
            "error",
            f"The {phase} step reads {key!r}, which is not there{at}. Given: {', '.join(given) or 'nothing'}."
            + (f" Nearest name: {meant!r}." if meant else ""),
            f"Return {key!r} from the model for every phase (None where it has no value), and let the reader skip None.",
            phase=phase,
            evidence={**evidence, "metric": key, "nearest": meant or ""},
        )
    text = str(error)
    mixed_up = isinstance(error, AttributeError) and isinstance(error.obj, tuple | list | float | int | dict | None)
    if mixed_up or (isinstance(error, TypeError) and ("must be Tensor, not" in text or "etrics must be" in text)):
        return Finding(
            "metric-type",
            "error",
            f"The {phase} step fails on a value of the wrong type: {text}{at}.",
            "Make every metric of one kind where it is made: a 0-d tensor, neither a tuple nor a Python number.",
            phase=phase,
            evidence=evidence,
        )
    return Finding(
        "metric-step-failed",
        "error",
        f"The {phase} step raised {type(error).__name__}: {text}{at}.",
        "Run the step on this batch by itself; its metrics could not be compared.",
        phase=phase,
        evidence=evidence,
    )


def _defaulted(phase: str, key: str, given: list[str]) -> Finding:
    meant = nearest(key, given)
    return Finding(
        "metric-missing",
        "warning",
        f"The {phase} step reads {key!r} with a default, but the model's dictionary does not hold it: the default is "
        f"shown as a result. Given: {', '.join(given)}." + (f" Nearest name: {meant!r}." if meant else ""),
        "Use None as the default and leave None out of means, or return the key from the model.",
        phase=phase,
        evidence={"metric": key, "nearest": meant or "", "given": given, "default": True},
    )


def _empty(phase: str) -> Finding:
    return Finding(
        "metric-missing",
        "warning",
        f"The {phase} step returned an empty dictionary.",
        "Return its metrics; without them the phases cannot be compared.",
        phase=phase,
    )


def _gathered(kinds: dict[str, dict[str, str]]) -> dict[int, Mapping[str, list[str]]]:
    own = {phase: list(names) for phase, names in kinds.items()}
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return {0: own}
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return dict(enumerate(everyone))
