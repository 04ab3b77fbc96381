"""Whether validation and inference hear what training heard."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log10, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope._record import Finding
from stethoscope.probes import Inputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record, Severity

_ENOUGH = 5
"""Training observations before anything is compared: fewer say nothing about the spread."""

_SPREADS = 4.0
"""Standard deviations over training observations; chance exceeds that in one of 10,000 for a normal spread."""


class _Quantity(NamedTuple):
    """What is compared, from which record, beyond which difference."""

    record: str
    text: str
    unit: str
    least: float
    severity: Severity
    advice: str


_QUANTITIES = (
    _Quantity("input/rms", "level", "dB", 6.0, "warning", "Normalise in the same way in all phases; look for int16 samples on one side."),
    _Quantity("input/mean", "mean", "", 0.5, "warning", "Subtract the same mean in all phases: the statistics of the training data."),
    _Quantity("input/roughness", "roughness (fine structure)", "dB", 3.0, "warning", "Compare sample rate, resampling, filtering or resizing of both data sets."),
    _Quantity("input/length", "length", "dB", 12.0, "info", "Fine for utterances after training on segments; models with limited memory or learned positions may suffer."),
    _Quantity("input/constant", "share of constant items", "", 0.25, "warning", "Look for silence, padding items or unreadable files that became zeros."),
)  # fmt: skip


@dataclass(frozen=True)
class InputDrift:
    """Compares what the model is given in other phases with what it was given in training.

    **What it decides:** `input-drift` when the mean over a phase differs from that over training by more than 4
    standard deviations of the training observations (at least 5 of them) *and* by more than: level (rms) 6 dB; mean 0.5 of
    the rms; roughness 3 dB; share of constant items 0.25; length a factor of 4 (info). `input-constant` when at
    least half of the items of a training step's first tensor are constant.
    The first tensor of 8 and more values per item is judged: masks, timesteps, what a decoder is given and targets differ on purpose.
    Raised again only after the phase was back within its bounds. Drift within training (a curriculum) is no finding.
    **Cost:** host, O(tensors).   **Needs:** `Inputs`; other phases run inside of `monitor.phase(name)`.

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> records = [Record("input/rms", 0.1, step) for step in range(5)]
        >>> records.append(Record("input/rms", 3276.8, 4, phase="val"))
        >>> replay(InputDrift(), records)[0].message
        'In phase val the level of the input is 70.3 dB, in training -20.0 dB (standard deviation 0.0 dB, 5 steps).'
    """

    @property
    def needs(self) -> tuple[Probe, ...]:
        """The model's inputs in all phases."""
        return (Inputs(),)

    def init(self) -> State:
        """Nothing seen."""
        return {"train": {}, "raised": []}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        train: dict[str, list[float]] = dict(state["train"])
        raised = list(state["raised"])
        found: list[Finding] = []
        rms = {record.phase: record.value for record in records if record.name == "input/rms"}
        for record in records:
            quantity = next((q for q in _QUANTITIES if record.name == q.record), None)
            if quantity is None or record.source != "probe" or not isinstance(record.value, (int, float)):
                continue
            if record.phase == "train":
                self._constant(record, raised, found)
            value = _value(quantity, record, rms.get(record.phase))
            if value is None:
                continue
            if record.phase == "train":
                train[record.name] = _welford(train.get(record.name, [0, 0.0, 0.0]), value)
            elif record.name in train and train[record.name][0] >= _ENOUGH:
                self._compare(quantity, record, value, train[record.name], raised, found)
        return {"train": train, "raised": raised}, found

    @staticmethod
    def _compare(
        quantity: _Quantity, record: Record, value: float, seen: list[float], raised: list[str], found: list[Finding]
    ) -> None:
        number, mean, squares = seen
        spread = sqrt(squares / (number - 1))
        key = f"{record.phase} {record.name}"
        if abs(value - mean) <= max(_SPREADS * spread, quantity.least):
            if key in raised:
                raised.remove(key)
            return
        if key in raised:
            return
        raised.append(key)
        unit = f" {quantity.unit}" if quantity.unit else " of its rms" if quantity.text == "mean" else ""
        found.append(
            Finding(
                "input-drift",
                quantity.severity,
                f"In phase {record.phase} the {quantity.text} of the input is {_text(value)}{unit}, in training "
                f"{_text(mean)}{unit} (standard deviation {_text(spread)}{unit}, {number:.0f} steps).",
                quantity.advice,
                step=record.step,
                phase=record.phase,
                rank=record.rank,
                evidence={"record": record.name, "value": value, "training_mean": mean, "training_std": spread},
            )
        )

    @staticmethod
    def _constant(record: Record, raised: list[str], found: list[Finding]) -> None:
        if record.name != "input/constant" or not isinstance(record.value, (int, float)):
            return
        if record.value < 0.5:
            if "constant" in raised:
                raised.remove("constant")
        elif "constant" not in raised:
            raised.append("constant")
            found.append(
                Finding(
                    "input-constant",
                    "warning",
                    f"{record.value:.0%} of the items given to the model in this step hold one value only.",
                    "Look at the batch: silence, black images, padding, or a loader that returns zeros for files that it cannot read.",
                    step=record.step,
                    rank=record.rank,
                    evidence={"share": record.value},
                )
            )


def _value(quantity: _Quantity, record: Record, rms: object) -> float | None:
    """The number that is compared: decibels for ratios, the mean in units of the rms; None for none."""
    assert isinstance(record.value, (int, float))
    value = float(record.value)
    if not isfinite(value):
        return None
    if quantity.unit == "dB":
        return 20 * log10(value) if value > 0 else None
    if quantity.record == "input/mean":
        return value / rms if isinstance(rms, float) and isfinite(rms) and rms > 0 else None
    return value


def _text(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # no minus before zero


def _welford(seen: list[Any], value: float) -> list[float]:
    """Count, mean and sum of squared deviations, updated.

    References: Welford 1962, Note on a method for calculating corrected sums of squares and products.
    """
    number, mean, squares = seen
    number += 1
    change = value - mean
    mean += change / number
    return [number, mean, squares + change * (value - mean)]
