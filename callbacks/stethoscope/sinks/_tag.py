"""The name of a series on a dashboard, the same for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stethoscope._record import Record

FOREIGN = "stethoscope_"
"""Put before the group where the dashboard also holds the user's own series.

TensorBoard makes one section out of everything that shares its first path segment, hence no slash.
"""


def tag(record: Record, prefix: str = "") -> str:
    """Name the series that a record belongs to: `group/statistic[/module][#call]`.

    What a probe measured keeps its name, what was given to `Monitor.step` goes under `step`, and what was logged goes
    under its phase. In a phase other than `train` the group of the first two gets the phase as a suffix. The rank is
    not part of it: each process writes its own run.

    Args:
        record: any record.
        prefix: put before everything, without a separator of its own.

    Examples:
        >>> from stethoscope import Record
        >>> tag(Record("activation/rms", 1.0, step=0, module="encoder.3", call=1, phase="val"))
        'activation_val/rms/encoder.3#1'
        >>> tag(Record("loss", 1.0, step=0, source="step")), tag(Record("sdr", 9.0, step=0, phase="val", source="log"))
        ('step/loss', 'val/sdr')
    """
    if record.source == "log":
        name = f"{record.phase}/{record.name}"
    else:
        name = record.name if record.source == "probe" else f"step/{record.name}"
        if record.phase != "train":
            group, slash, rest = name.partition("/")
            name = f"{group}_{record.phase}{slash}{rest}"
    module = f"/{record.module}" if record.module else ""
    call = f"#{record.call}" if record.call else ""
    return f"{prefix}{name}{module}{call}"
