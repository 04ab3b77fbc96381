"""How the same record of several ranks becomes one: the table of operations, and its arithmetic.

Used while the training runs (`_reduce.py`) and when files of several ranks are read together (`sinks.read`), so that both
give the same numbers. Standard library only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from stethoscope._record import Histogram, Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Operation: TypeAlias = Literal["mean", "rms", "sum", "min", "max"]
"""Over ranks: mean, root of the mean square, sum (of histograms: bin by bin), smallest, largest.

For flags "max" is "any" and "min" is "all". Each rank counts once, however large its batch.
"""

OPERATIONS: Mapping[str, Operation] = {
    "activation/mean": "mean",
    "activation/rms": "rms",
    "activation/std": "rms",
    "activation/kurtosis": "mean",
    "activation/zero_fraction": "mean",
    "activation/min": "min",
    "activation/max": "max",
    "activation/absmax": "max",
    "activation/histogram": "sum",
    "activation/nonfinite": "max",
    "activation/outermost_nonfinite": "max",
    "activation/nonfinite_count": "sum",
    "gradient/norm": "rms",
    "gradient/nonfinite": "sum",
    "parameter/norm": "rms",
    "parameter/update_ratio": "rms",
    "parameter/unchanged": "min",
    "parameter/outward": "mean",
    "parameter/nonfinite": "max",
    "density/elements": "mean",
    "density/blocks": "mean",
    "density/weights": "mean",
    "density/initial": "mean",
    "input/mean": "mean",
    "input/rms": "rms",
    "input/absmax": "max",
    "input/roughness": "mean",
    "input/length": "mean",
    "input/constant": "mean",
    "input/repeated": "mean",
    "input/returned": "mean",
    "input/column_rms": "max",
    "input/level": "rms",
    "input/items_db": "mean",
    "separation": "mean",
}
"""Record name, without `input_` and without the path of a tensor, to operation. What is not here stays with its rank."""

WHOLES: Mapping[str, tuple[str, Operation]] = {
    "parameter/shard_norm": ("parameter/norm", "rms"),
    "parameter/shard_update_norm": ("parameter/update_norm", "rms"),
    "parameter/shard_unchanged": ("parameter/unchanged", "min"),
    "gradient/shard_norm": ("gradient/norm", "rms"),
    "gradient/shard_nonfinite": ("gradient/nonfinite", "mean"),
    "density/shard_elements": ("density/elements", "mean"),
    "density/shard_blocks": ("density/blocks", "mean"),
}
"""What is recorded of one rank's part of a tensor that is split over ranks: the whole's name, and the operation.

A whole that lies in n different parts is n times the mean (rms: root n times) over all ranks, whether each part is held
by one rank or by several.
"""

LONE = frozenset({"nonfinite", "outermost_nonfinite", "shard_nonfinite"})
"""Flags stay with their rank while the training runs: which rank is the question, and they are left out where all is well."""


class Terms(NamedTuple):
    """A record's contribution: numbers to be added up over ranks, and numbers of which the largest counts."""

    sums: tuple[float, ...]
    peaks: tuple[float, ...] = ()


def operation(record: Record) -> Operation | None:
    """Return how a record is combined over ranks; None where it stays with its rank.

    Numbers given to `Monitor.step` are averaged; logged metrics are left alone, since nobody knows what they mean.

    Examples:
        >>> operation(Record("activation/input_min.mask", -1.0, 0)), operation(Record("loss", 2.0, 0, source="step"))
        ('min', 'mean')
    """
    if record.source == "log" or record.value is None:
        return None
    if record.source == "step":
        return "max" if record.name.startswith("guard/") else "mean"
    if record.name in WHOLES:
        return WHOLES[record.name][1]
    group, _, rest = record.name.partition("/")
    statistic = rest.partition(".")[0].removeprefix("input_")
    found = OPERATIONS.get(f"{group}/{statistic}") or OPERATIONS.get(group)
    return None if isinstance(record.value, Histogram) and found != "sum" else found


def is_part(record: Record) -> bool:
    """Whether a record tells about one rank's part of something."""
    return record.name in WHOLES


def is_lone(record: Record) -> bool:
    """Whether a record stays with its rank while the training runs."""
    statistic = record.name.partition("/")[2].partition(".")[0].removeprefix("input_")
    return statistic in LONE and not (record.name.startswith("gradient/") and not record.module)


def terms(record: Record) -> Terms:
    """Return what a rank contributes to the combined record.

    Args:
        record: one that has an operation.
    """
    value, how = record.value, operation(record)
    if isinstance(value, Histogram):
        return Terms(value.counts)
    assert value is not None, record
    if how in ("min", "max"):
        # of several numbers one of which is NaN, the largest depends on their order: a sum does not
        nan = math.nan if math.isnan(value) else 0.0
        peak = -math.inf if math.isnan(value) else value
        return Terms((nan,), (-peak if how == "min" and not math.isnan(value) else peak,))
    return Terms((value * value,) if how == "rms" else (value,))


def combined(record: Record, total: Terms, ranks: int, parts: int) -> Record:
    """Return the record of all ranks.

    Args:
        record: of any of them.
        total: sums and largest of `terms` over ranks.
        ranks: how many there were.
        parts: into how many different parts the tensor is split, where `is_part(record)`.

    Examples:
        >>> mine = Record("parameter/shard_norm", 3.0, 0, module="weight")
        >>> combined(mine, Terms((3.0**2 + 4.0**2,)), ranks=2, parts=2)[:2]
        ('parameter/norm', 5.0)
    """
    how = operation(record)
    name = WHOLES[record.name][0] if record.name in WHOLES else record.name
    if isinstance(record.value, Histogram):
        return record._replace(value=Histogram(record.value.edges, total.sums))
    value = total.sums[0]
    if how in ("min", "max"):
        value += -total.peaks[0] if how == "min" else total.peaks[0]
    elif how != "sum":
        value *= (parts if record.name in WHOLES else 1) / ranks
        value = math.sqrt(value) if how == "rms" else value
    return record._replace(name=name, value=value)


def add_up(several: Sequence[Terms]) -> Terms:
    """Return sums and largest over ranks."""
    return Terms(
        tuple(map(sum, zip(*(each.sums for each in several), strict=True))),
        tuple(map(max, zip(*(each.peaks for each in several), strict=True))),
    )


def with_ratios(records: Sequence[Record]) -> list[Record]:
    """Put `parameter/update_ratio` in place of `parameter/update_norm`, which only the whole's norm can be set against.

    The norm before the step is not known: a ratio is at most 2.
    """
    norms = {record.module: record.value for record in records if record.name == "parameter/norm"}
    out = []
    for record in records:
        norm = norms.get(record.module)
        if record.name == "parameter/update_norm" and isinstance(norm, float) and isinstance(record.value, float):
            against = max(norm, record.value / 2)
            ratio = record.value / against if against else 0.0
            out.append(record._replace(name="parameter/update_ratio", value=ratio))
        else:
            out.append(record)
    return out
