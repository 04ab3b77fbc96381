"""Writes to Weights & Biases."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding, Histogram, Record
from stethoscope.sinks._bins import trim
from stethoscope.sinks._budget import MAX_SERIES, Budget
from stethoscope.sinks._markdown import escape
from stethoscope.sinks._pictures import Painted, Pictures
from stethoscope.sinks._tag import tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Run

_STEP = "stethoscope/step"
_MAX_BINS = 512
"""wandb.Histogram refuses more."""
_MAX_TITLE = 63
"""W&B: "must be less than 64 characters long"."""
_ALERT_SECONDS = 300
"""Silence after an alert, for alerts with the same title."""
_MAX_ROWS = 1000
_COLUMNS = ("step", "severity", "code", "module", "phase", "rank", "message", "advice", "cause")


@dataclass(eq=False)
class WandB:
    """Writes to a W&B run, online or offline, beside what the user logs there.

    Everything lies under `stethoscope/`, with `stethoscope/step` as its x axis; the run's own step is never given, since
    W&B drops rows whose step is below the last one. What belongs to one step of ours becomes a part of one row. Findings of warning and above become
    alerts, and all of them a table `stethoscope/findings` at the end; a picture of layers by steps now and then. The run stays open. On a rank other than 0 that has
    no run, nothing is written.

    **Cost:** 2-3 ms of the caller's time for 300 numbers.

    Args:
        run: what `wandb.init` returned; None takes `wandb.run` when the sink opens.
        max_series: series per emission, see the log; None writes all.
        commit: end W&B's row when the next step of ours comes and nobody has ended it meanwhile, so that W&B's own step grows
            no faster than the training's. False never ends a row: for runs that pass epochs as `step=` to `run.log`, which would
            fall behind and be dropped; of our steps between two rows the last one is then what stays.

    Raises:
        TypeError: `run` is no W&B run.
        ImportError: from `open`, wandb is not installed.
        RuntimeError: from `open`, no run was given and none is active.

    Examples:
        >>> WandB().max_series
        300
    """

    run: Any = None
    max_series: int | None = MAX_SERIES
    commit: bool = True
    _budget: Budget = field(init=False, repr=False)
    _opened: bool = field(default=False, init=False, repr=False)
    _to: Any = field(default=None, init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)
    _row: tuple[int | None, int] = field(
        default=(None, 0), init=False, repr=False
    )  # our step and W&B's, of the row that we wrote to last
    _findings: list[Finding] = field(default_factory=list[Finding], init=False, repr=False)
    _pictures: Pictures = field(default_factory=Pictures, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.run is not None and not is_wandb_run(self.run):
            raise TypeError(
                f"WandB got a {type(self.run).__qualname__}. Give it what wandb.init() returned, or nothing."
            )
        self._budget = Budget("WandB", self.max_series)

    def open(self, run: Run) -> None:
        """Tell W&B which x axis our series have."""
        self._pictures.order(run.modules)
        self._to = self._find_run(run.rank)
        self._opened = True
        if self._to is not None:
            self._to.define_metric(_STEP, hidden=True)
            # With step_sync, W&B fills a missing step with the one before.
            self._to.define_metric("stethoscope/*", step_metric=_STEP, step_sync=False)

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Log one row, and raise alerts."""
        if not self._opened:
            raise RuntimeError(f"{self!r} is not open: call open(run) before write(...).")
        if self._to is None:
            return
        self._findings += findings
        self._step = max(self._step, step)
        row = {tag(record, "stethoscope/"): _value(record) for record in self._budget.admit(records, findings)}
        row = {name: value for name, value in row.items() if value is not None}
        if row:
            self._log(self._to, row, step)
        for painted in self._pictures.add(step, records):
            self._show(self._to, painted)
        for finding in findings:
            if finding.severity != "info":
                self._alert(finding)

    def close(self) -> None:
        """Log the last pictures and the table of findings."""
        run, self._to, self._opened = self._to, None, False
        findings, self._findings = self._findings, []
        if run is None:
            return
        for painted in self._pictures.last():
            self._show(run, painted)
        if findings:
            from wandb import Table

            rows = [[getattr(finding, column) for column in _COLUMNS] for finding in findings[-_MAX_ROWS:]]
            self._log(run, {"stethoscope/findings": Table(columns=list(_COLUMNS), data=rows)}, self._step)

    def _log(self, run: Any, row: dict[str, Any], step: int) -> None:
        ours, theirs = self._row
        if self.commit and ours not in (None, step) and theirs == _row(run):  # nobody has ended that row since
            run.log({}, commit=True)
        run.log(row | {_STEP: step}, commit=False)
        self._row = step, _row(run)

    def _show(self, run: Any, painted: Painted) -> None:
        if find_spec("PIL") is None:  # W&B turns arrays into pictures by it, and does not bring it along
            return
        from wandb import Image

        image = Image(painted.pixels, caption=painted.text)
        self._log(run, {f"stethoscope/layers/{painted.name}": image}, self._step)

    def _find_run(self, rank: int) -> Any:
        if self.run is not None:
            return self.run
        try:
            import wandb
        except ImportError as error:
            raise ImportError('WandB needs the package: pip install "stethoscope[wandb]".') from error
        if wandb.run is None and not rank:
            raise RuntimeError(
                'WandB() found no active run. Call wandb.init(...) before, with mode="offline" if there is no account, or give '
                "a run: WandB(run)."
            )
        if wandb.run is None:
            logging.getLogger("stethoscope").info("Rank %d has no W&B run; its records are not written there.", rank)
        return wandb.run

    def _alert(self, finding: Finding) -> None:
        where = f" in {finding.module}" if finding.module else ""
        title = f"{finding.code}{where}"
        self._to.alert(
            title=title if len(title) <= _MAX_TITLE else title[: _MAX_TITLE - 3] + "...",
            text=escape(str(finding)),
            level="ERROR" if finding.severity == "error" else "WARN",
            wait_duration=_ALERT_SECONDS,
        )


def _row(run: Any) -> int:
    """Number the row at hand, without a question to W&B's service: `run.step` waits up to 30 s for one that hangs."""
    known = getattr(run, "_local_step", getattr(run, "_step", None))
    return known if isinstance(known, int) else int(run.step)


def is_wandb_run(obj: object) -> bool:
    """Whether its class has what `wandb.Run` has; Lightning's dummies answer to every name themselves."""
    return all(callable(getattr(type(obj), name, None)) for name in ("log", "define_metric", "alert"))


def _value(record: Record) -> Any:
    if not isinstance(record.value, Histogram):
        return None if record.value is None else float(record.value)
    bins = trim(record.value, most=_MAX_BINS)
    if bins is None or not math.isfinite(bins.counts.sum()):
        return None
    from wandb import Histogram as WandBHistogram

    return WandBHistogram(np_histogram=(bins.counts.tolist(), bins.edges.tolist()))
