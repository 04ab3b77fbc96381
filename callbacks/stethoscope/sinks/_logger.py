"""Writes through any object that has `log_metrics`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding, Histogram, Record
from stethoscope.sinks._budget import MAX_SERIES, Budget
from stethoscope.sinks._tag import FOREIGN, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Run

_NOT_ALLOWED = re.compile(r"[^\w./ -]")
"""MLflow refuses a whole call for one other character."""


@dataclass(eq=False)
class Logger:
    """Writes numbers through the loggers of Lightning and Fabric, the `mlflow` module, a Comet experiment and the like.

    Numbers only: histograms and findings have no place there; findings still reach every other sink and, from warning
    on, `logging.getLogger("stethoscope")`. Groups get the prefix `stethoscope_`, since the logger also holds the user's
    series; characters other than letters, digits and `_ . / -` become `_`. The set of series is kept as it was at first,
    and layers with findings are not added, since a CSVLogger writes its whole file anew for each new name.

    Args:
        logger: has `log_metrics(metrics: dict[str, float], step: int)`; it stays open. `save()` is called at the end
            where there is one.
        max_series: series per emission, see the log; None writes all.

    Raises:
        TypeError: there is no `log_metrics`.

    Examples:
        >>> class Print:
        ...     def log_metrics(self, metrics, step):
        ...         print(step, metrics)
        >>> from stethoscope._protocols import Run
        >>> from stethoscope.testing import series
        >>> sink = Logger(Print())
        >>> sink.open(Run("a", "2026-01-01T00:00:00+00:00"))
        >>> sink.write(0, series(loss=[2.0]), [])
        0 {'stethoscope_step/loss': 2.0}
    """

    logger: Any
    max_series: int | None = MAX_SERIES
    _budget: Budget = field(init=False, repr=False)
    _open: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(getattr(self.logger, "log_metrics", None)):
            raise TypeError(f"Logger got a {type(self.logger).__qualname__}, which has no log_metrics(metrics, step).")
        self._budget = Budget("Logger", self.max_series)

    @property
    def folder(self) -> Path | None:
        """The logger's `log_dir`, where it has one on this machine: further files of the run belong there."""
        place = getattr(self.logger, "log_dir", None)
        return Path(place) if isinstance(place, str) and "://" not in place else None

    def open(self, run: Run) -> None:
        """Accept writes."""
        self._open = True

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Call `log_metrics` once with all numbers; not at all where there is none."""
        if not self._open:
            raise RuntimeError(f"{self!r} is not open: call open(run) before write(...).")
        metrics = {
            _NOT_ALLOWED.sub("_", tag(record, FOREIGN)): float(record.value)
            for record in self._budget.admit(records)
            if record.value is not None and not isinstance(record.value, Histogram)
        }
        if metrics:
            self.logger.log_metrics(metrics, step=step)

    def close(self) -> None:
        """Ask the logger to save what it holds back."""
        if self._open:
            self._open = False
            save = getattr(self.logger, "save", None)
            if callable(save):
                save()
