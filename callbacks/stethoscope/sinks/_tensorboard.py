"""Writes TensorBoard event files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope._record import Finding, Histogram, Record
from stethoscope.sinks._bins import Bins, trim
from stethoscope.sinks._budget import MAX_SERIES, Budget
from stethoscope.sinks._layout import layout
from stethoscope.sinks._markdown import escape, table
from stethoscope.sinks._pictures import Painted, Pictures
from stethoscope.sinks._tag import FOREIGN, tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.tensorboard import SummaryWriter

    from stethoscope._protocols import Run

_FLUSH_SECONDS = 10
_QUEUE = 1000
"""Events that may wait for the writer's thread; SummaryWriter's 10 would let a slow disk stop the training."""


@dataclass(eq=False)
class TensorBoard:
    """Writes scalars, histograms, findings and a picture of layers by steps for TensorBoard.

    - Scalars and histograms: `activation/rms/encoder.3` and so on, one section for each group. At most `max_series` at
      a time, chosen once, see the log.
    - Custom scalars: one chart per statistic with all its layers; laid out when the first probe
      reports, in a folder of our own.
    - Text: `findings`, a table of all findings so far, newest first; `layers/...`, how to read the pictures.
    - Images: `layers/<group>/rms`, layers from top to bottom and steps from left to right; after 16, 32, 64 ...
      observed steps and at the end.

    In a SummaryWriter that belongs to the user (TensorBoard makes one section of all tags that share the first segment)
    every group gets the prefix `stethoscope_`, the layout of the custom scalars is left alone, and `close` only flushes.
    In a folder, ranks other than 0 write a run of their own, `rank<N>`. A resumed run hides what was written after the
    step it goes on from, except for text.

    **Cost:** one event per write for all series, about 2 ms of the caller's time per 1000 scalars; a picture
    takes 5 to 40 ms. Up to 10 s of events are lost when the process is killed, but none from before the last
    `Monitor.flush` or `state_dict`, and no finding.

    Args:
        target: folder of the run, or a `torch.utils.tensorboard.SummaryWriter`.
        max_series: series per emission, see above; None writes all.

    Raises:
        TypeError: `target` is neither.
        ImportError: from `open`, tensorboard is not installed.
        OSError: from `open`, the folder cannot be written.

    Examples:
        >>> from stethoscope._protocols import Run
        >>> from stethoscope.testing import series
        >>> sink = TensorBoard("runs/today")
        >>> sink.open(Run("a", "2026-01-01T00:00:00+00:00"))
        >>> sink.write(0, series(loss=[2.0]), [])
        >>> sink.close()
    """

    target: str | Path | SummaryWriter
    max_series: int | None = MAX_SERIES
    _budget: Budget = field(init=False, repr=False)
    _writer: Any = field(default=None, init=False, repr=False)
    _prefix: str = field(default="", init=False, repr=False)
    _laid_out: bool = field(default=False, init=False, repr=False)
    _findings: list[Finding] = field(default_factory=list[Finding], init=False, repr=False)
    _pictures: Pictures = field(default_factory=Pictures, init=False, repr=False)
    _step: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.target, str | Path) and not is_summary_writer(self.target):
            raise TypeError(
                f"TensorBoard got a {type(self.target).__qualname__}. Give it a folder or a torch.utils.tensorboard.SummaryWriter."
            )
        self._budget = Budget("TensorBoard", self.max_series)

    @property
    def background(self) -> bool:
        """Whether a monitor may write from a thread of its own: not to a writer that the caller writes to as well."""
        return isinstance(self.target, str | Path)

    @property
    def folder(self) -> Path | None:
        """The run's folder, where further files of the run belong; None where it is on another machine."""
        place = str(self.target if isinstance(self.target, str | Path) else self.target.log_dir)
        return None if "://" in place else Path(place)

    def open(self, run: Run) -> None:
        """Create the event file, or take the writer as it is."""
        self._pictures.order(run.modules)
        if not isinstance(self.target, str | Path):
            self._writer, self._prefix, self._laid_out = self.target, FOREIGN, True
            if self._writer.file_writer is None:
                # as each of its own methods does; Lightning closes the writer of its logger after every fit
                self._writer._get_file_writer()  # noqa: SLF001
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('TensorBoard needs the package: pip install "stethoscope[tensorboard]".') from error
        folder = Path(self.target) / f"rank{run.rank}" if run.rank else Path(self.target)
        folder.mkdir(parents=True, exist_ok=True)
        purge = None if run.resumed_from is None else run.resumed_from + 1
        create: Any = SummaryWriter  # torch leaves it without types
        self._writer = create(str(folder), purge_step=purge, max_queue=_QUEUE, flush_secs=_FLUSH_SECONDS)

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Write one event with all scalars, and what else there is."""
        if self._writer is None or self._writer.file_writer is None:
            raise RuntimeError(f"{self!r} is not open, or its SummaryWriter was closed: open it before write(...).")
        self._step = max(self._step, step)
        self._write_series(step, self._budget.admit(records, findings))
        for painted in self._pictures.add(step, records):
            self._paint(self._writer, painted)
        if findings:
            self._findings += findings
            self._writer.add_text(f"{self._prefix}findings", table(self._findings), step)
            self._writer.flush()

    def flush(self) -> None:
        """Bring to the file what the writer holds back: a checkpoint, say, is not to know of more steps than the file."""
        if self._writer is not None and self._writer.file_writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write the last pictures; close the file, or flush a writer that belongs to the user."""
        writer, self._writer = self._writer, None
        if writer is None or writer.file_writer is None:
            return
        try:
            for painted in self._pictures.last():
                self._paint(writer, painted)
        finally:
            writer.flush()
            if writer is not self.target:
                writer.close()

    def _write_series(self, step: int, records: Sequence[Record]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = {}
        for record in records:
            name = tag(record, self._prefix)
            if isinstance(record.value, Histogram):
                bins = trim(record.value)
                if bins is not None:
                    values[name] = Summary.Value(tag=name, histo=_histogram(bins))
            elif record.value is not None:
                values[name] = Summary.Value(tag=name, simple_value=float(record.value))
        if not values:
            return
        # One event with many values costs a thirtieth of one add_scalar or add_histogram_raw for each.
        self._writer.file_writer.add_summary(Summary(value=values.values()), step)
        # There is one layout per run, so it waits for what the training's probes read.
        if not self._laid_out and any(record.source == "probe" and record.phase == "train" for record in records):
            self._laid_out = True
            self._writer.add_custom_scalars(layout(records))

    def _paint(self, writer: Any, painted: Painted) -> None:
        rows = "\n".join(f"{row}. {escape(layer)}" for row, layer in enumerate(painted.layers, start=1))
        writer.add_image(f"{self._prefix}layers/{painted.name}", painted.pixels, self._step, dataformats="HWC")
        writer.add_text(
            f"{self._prefix}layers/{painted.name}", f"{painted.text}\n\nRows from the top:\n\n{rows}", self._step
        )


def is_summary_writer(obj: object) -> bool:
    """Whether it is torch's SummaryWriter; tensorboardX has the same methods and other messages inside."""
    names = ("add_histogram_raw", "add_custom_scalars", "add_image", "add_text")
    return all(hasattr(type(obj), name) for name in names) and not type(obj).__module__.startswith("tensorboardX")


def _histogram(bins: Bins) -> Any:
    """Make TensorBoard's histogram: limits are the right edges, and sums are those of the bins' middles."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    edges, counts = bins
    middles = edges[:-1] / 2 + edges[1:] / 2
    with np.errstate(over="ignore"):
        total, squares = float(counts @ middles), float(counts @ middles**2)
    return HistogramProto(
        min=float(edges[0]),
        max=float(edges[-1]),
        num=float(counts.sum()),
        sum=total,
        sum_squares=squares,
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
