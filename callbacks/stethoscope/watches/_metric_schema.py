"""The contract about metric dictionaries: declared or learned, judged while training, read safely."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence  # noqa: TC003 - LightningCLI reads the annotations at run time
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stethoscope._metrics import normalise
from stethoscope._record import Finding, Record, Report
from stethoscope.watches import _metric_findings as findings
from stethoscope.watches import _metric_fold as fold
from stethoscope.watches import _metric_lock as locks
from stethoscope.watches import _metric_means as means
from stethoscope.watches import _metric_names as names
from stethoscope.watches._metric_contract import Contract
from stethoscope.watches._metric_field import Field, read

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stethoscope._protocols import Probe, State


@dataclass(frozen=True)
class MetricSchema:
    """Judges metric dictionaries against a declaration, or against what they used to hold.

    **What it decides:** whether a key that must be there is missing, unexpected, of the wrong kind, beyond its limits,
    not finite, gone after it was there, never anything but None, an accuracy of exactly 0.0 a hundred times in a row,
    or reported in training but not in validation. Counts, times, speeds and learning rates are left out of what is
    learned. Only what `Monitor.log` was given is judged.
    **Cost:** host only, about 1.5 us per entry.   **Needs:** no probe.

    Args:
        fields: what is declared: a mapping of names to types or `Field`, a TypedDict, a dataclass or a pydantic model.
            None learns the keys of each phase from its dictionaries; after two of a phase what it holds is the rule.
        lock: path of a lock file, read here if it exists. It stands in for `fields` where they are None, and is
            compared with them where they are given. `write_lock` writes it.
        aliases: other names of metrics, `{"acc": "th_accuracy"}`. The phase (train, val, valid, dev, cv, eval, test)
            before or behind a name with `_ / . -`, the suffixes `_step`, `_epoch`, `/dataloader_idx_N`, and acc for
            accuracy or th_accuracy need none.
        on_mismatch: what `validate` does with a warning or an error: `"raise"`, `"warn"`, or only `"fill"` with None.
            The training loop is never stopped by it.

    Raises:
        TypeError, ValueError: a declaration that cannot be read or contradicts itself; a lock file that is corrupt or
            from a newer version.

    Examples:
        >>> schema = MetricSchema({"loss": float, "th_accuracy": float | None}, on_mismatch="fill")
        >>> schema.validate({"loss": 2}, phase="val")
        {'loss': 2.0, 'th_accuracy': None}
        >>> from stethoscope.testing import replay
        >>> replay(schema, [Record("loss", 2.0, 0, phase="val", source="log")])[0].code
        'metric-missing'
    """

    fields: Any = None
    _: KW_ONLY
    lock: str | Path | None = None
    aliases: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    on_mismatch: Literal["raise", "warn", "fill"] = "warn"

    def __post_init__(self) -> None:
        if self.on_mismatch not in {"raise", "warn", "fill"}:
            raise ValueError(f"on_mismatch={self.on_mismatch!r} is unknown. Legal: 'raise', 'warn', 'fill'.")
        self._contract  # noqa: B018 - a wrong declaration is said at set-up

    @property
    def needs(self) -> tuple[Probe, ...]:
        """No probe."""
        return ()

    def init(self) -> State:
        """The state before the first dictionary."""
        return fold.init()

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """Take in the records of one log call; those of other sources are passed over."""
        new, found = fold.update(self._contract, state, records)
        if self._contract.means:
            new, more = means.update(self._contract, new, records)
            found += more
        if not state["phases"] and new["phases"] and (difference := self.difference()):
            first = records[0]
            at = findings.At(first.step, first.phase, first.rank)
            found.insert(0, findings.lock_differs(at, str(self.lock), difference))
        return new, found

    def validate(self, metrics: object, phase: str = "train") -> dict[str, float | None]:
        """Return a plain dictionary of floats and None that holds every declared key. Waits for the device.

        A key that is missing and a value that is None or no scalar are both None; no number is ever made up. Findings
        tell them apart; `on_mismatch` decides what becomes of warnings and errors.

        Args:
            metrics: any toolkit's dictionary, see `Monitor.log`.
            phase: `"train"`, `"val"` (valid, dev, cv and eval are the same), `"test"` or any other.

        Raises:
            TypeError: not a dictionary, or keys that are not strings.
            FindingsError: with `on_mismatch="raise"`, a warning or an error was found.
        """
        records = _read(metrics, phase)
        report = Report(title=f"{phase} metrics", findings=tuple(self._findings(records, phase)))
        if not report.ok and self.on_mismatch == "raise":
            report.raise_for_findings()
        if not report.ok and self.on_mismatch == "warn":
            warnings.warn(str(report), stacklevel=2)
        values: dict[str, float | None] = dict.fromkeys(self._contract.fields)
        for record in records:
            usual = names.split(record.name).phase or names.phase(phase)
            name = self._contract.find(record.name, usual) or record.name
            values[name] = record.value  # type: ignore[assignment]  # no histogram is logged
        return values

    def judge(self, metrics: object, phase: str = "train") -> Report:
        """Return what is wrong with one dictionary by itself, whatever `on_mismatch` says. Waits for the device."""
        return Report(title=f"{phase} metrics", findings=tuple(self._findings(_read(metrics, phase), phase)))

    def compare(self, known: Mapping[str, Iterable[str]], step: int | None = None) -> list[Finding]:
        """Judge names alone, before there are values: against the declaration, and one phase against the other.

        Args:
            known: phase to names, e.g. of a sanity check and of a first training batch.
            step: for the findings.

        Examples:
            >>> MetricSchema().compare({"val": ["val_loss"], "train": ["train_loss", "train_acc"]})[0].evidence["metric"]
            'train_acc'
        """
        state, found = fold.init(), list[Finding]()
        for phase in sorted(known, key=lambda name: names.phase(name) == "train"):
            records = [Record(name, 1.0, 0, phase=phase, source="log") for name in known[phase]]
            state, said = fold.update(self._contract, state, records)
            found += [replace(finding, step=step) for finding in said]
        of_names = {"metric-missing", "metric-unexpected", "metric-phase-mismatch"}
        return [finding for finding in found if finding.code in of_names]

    def _findings(self, records: list[Record], phase: str) -> list[Finding]:
        """Judge one dictionary by itself; unlike in the loop, an empty one is a fault."""
        _, found = fold.update(self._contract, fold.init(), records)
        usual = names.phase(phase)
        held = {self._contract.find(record.name, names.split(record.name).phase or usual) for record in records}
        said = {finding.evidence.get("metric") for finding in found if finding.code == "metric-missing"}
        given = [record.name for record in records]
        found += [
            findings.missing(findings.At(0, phase), name, given, names.nearest(name, given), declared=True)
            for name in self._contract.expected(usual)
            if name not in held | said
        ]
        # There is no step here, and whoever validates a loss may call backward on it next.
        return [replace(finding, step=None) for finding in found if finding.code != "metric-grad"]

    @classmethod
    def learn(cls, train: Iterable[object], val: Iterable[object] = (), **options: Any) -> MetricSchema:
        """Return a schema declared by example. No value is read.

        Args:
            train: dictionaries of training, e.g. of its first batches.
            val: dictionaries of validation.
            **options: the keyword arguments of `MetricSchema`.

        Examples:
            >>> schema = MetricSchema.learn([{"loss": 2.0, "lr": 0.1}], [{"loss": 2.1, "acc": 0.5}])
            >>> print(schema.to_markdown().splitlines()[3][:30])
            | `acc` | number |  |  | yes |
        """
        state = fold.init()
        for phase, dictionaries in (("train", train), ("val", val)):
            for metrics in dictionaries:
                records = [
                    Record(name, None if value is None else 1.0, 0, phase=phase, source="log", kind=kind)
                    for name, value, kind in normalise(metrics)
                ]
                state, _ = fold.update(Contract({}, {}), state, records)
        return cls(fold.fields(state), **options)

    def locked(self, state: State) -> MetricSchema:
        """Return a schema that declares what this one has learned in `state`; what is declared stays as it is."""
        return MetricSchema(
            {**fold.fields(state), **self._contract.fields},
            lock=self.lock,
            aliases=self.aliases,
            on_mismatch=self.on_mismatch,
        )

    def write_lock(self, path: str | Path | None = None) -> Path:
        """Write the declared metrics to `path` (default: `lock`), to be put under version control.

        Raises:
            ValueError: nothing is declared, or no path is known.
        """
        to = path or self.lock
        if to is None:
            raise ValueError("No path for the lock file. Give one: write_lock('schema.lock.json').")
        if not self._contract.fields:
            raise ValueError(
                "Nothing is declared, so there is nothing to lock. Declare fields, or use MetricSchema.learn or .locked."
            )
        Path(to).write_text(locks.dumps(self._contract.fields), encoding="utf-8")
        return Path(to)

    def difference(self) -> str:
        """Return what the declaration changes against the lock file, one metric per line; `""` where nothing does."""
        if self.fields is None or self._locked is None:
            return ""
        return locks.difference(self._locked, self._contract.fields)

    def to_markdown(self) -> str:
        """Return a Markdown table of the declared metrics for a model's documentation."""
        return locks.markdown(self._contract.fields)

    @property
    def declared(self) -> Mapping[str, Field]:
        """The declaration of each metric, from `fields` or else from the lock file."""
        return dict(self._contract.fields)

    @cached_property
    def _locked(self) -> dict[str, Field] | None:
        return locks.load(Path(self.lock)) if self.lock is not None and Path(self.lock).exists() else None

    @cached_property
    def _contract(self) -> Contract:
        declared = (self._locked or {}) if self.fields is None else read(self.fields)
        if self.fields is not None:
            self._locked  # noqa: B018 - a corrupt lock file is said at set-up
        return Contract(declared, self.aliases)


def _read(metrics: object, phase: str) -> list[Record]:
    return [
        Record(name, None if value is None else float(value), 0, phase=phase, source="log", kind=kind)
        for name, value, kind in normalise(metrics)
    ]
