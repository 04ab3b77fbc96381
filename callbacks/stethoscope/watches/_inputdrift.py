"""Whether validation and inference hear what training heard."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, log10, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from stethoscope._record import Finding
from stethoscope.probes import Inputs
from stethoscope.watches import _metric_names as names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record, Severity

_ONE_ROW = 0.5  # share of all tokens by which one of them has become more frequent: no change of topic does that
_ENOUGH = 5
"""Training observations before anything is compared: fewer say nothing about the spread."""

_SPREADS = 4.0
"""Standard deviations over training observations; chance exceeds that in one of 10,000 for a normal spread."""

_FAR = 10.0
"""Standard deviations from which a smaller difference will do: batches that are all alike make it sure, however small it is."""

_MANY, _ONE_DB, _ONE = 0.25, 20.0, 10.0
"""Share of the columns that are off together, or how far a single one must be: a factor of ten in spread, ten spreads in mean. One column of
many, such as the year, may go its own way."""


Layers: TypeAlias = "dict[tuple[str, str], dict[str, float]]"
"""Of a phase and layer, record name to number."""


class _Quantity(NamedTuple):
    """What is compared, from which record, beyond which difference."""

    record: str
    text: str
    unit: str
    least: float
    small: float
    severity: Severity
    advice: str


_QUANTITIES = (
    _Quantity("input/rms", "level", "dB", 6.0, 4.0, "warning", "Normalise in the same way in all phases; look for int16 samples on one side."),
    _Quantity("input/mean", "mean", "", 0.5, 0.25, "warning", "Subtract the same mean in all phases: the statistics of the training data."),
    _Quantity("input/roughness", "roughness (fine structure)", "dB", 3.0, 3.0, "warning", "Compare sample rate, resampling, filtering or resizing of both data sets."),
    _Quantity("input/length", "length", "dB", 12.0, 12.0, "info", "Fine for utterances after training on segments; models with limited memory or learned positions may suffer."),
    _Quantity("input/constant", "share of constant items", "", 0.25, 0.25, "warning", "Look for silence, padding items or unreadable files that became zeros."),
)  # fmt: skip


@dataclass(frozen=True)
class InputDrift:
    """Compares what the model is given in other phases with what it was given in training.

    **What it decides:** `input-drift` when the mean over a phase differs from that over training by more than 4
    standard deviations of the training observations (at least 5 of them) *and* by more than: level (rms) 6 dB; mean 0.5 of
    the rms; roughness 3 dB; share of constant items 0.25; length a factor of 4 (info). Beyond 10 standard deviations, 4 dB of level and a mean of 0.25 of
    the rms will do. Or, of what a trained layer is given as data, a quarter of the columns (features, channels) have another spread (6 dB) or mean (one
    spread), beyond 8 standard deviations each (of at least 10 observations), or a single one by 20 dB or ten spreads. `input-constant` when at
    least half of the items of a training step's first tensor are constant.
    `validation-in-train-mode` when the model is in train mode in a phase of validation or test and BatchNorm modules take its batches into their running
    statistics, or dropout drops. Dropout that is left on by purpose is in train mode by itself, in a model that is not.
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
        layers = _by_layer(records)
        _columns(layers, records, raised, found)
        _rows(layers, records, raised, found)
        _modes(records, raised, found)
        return {"train": train, "raised": raised}, found

    @staticmethod
    def _compare(
        quantity: _Quantity, record: Record, value: float, seen: list[float], raised: list[str], found: list[Finding]
    ) -> None:
        number, mean, squares = seen
        spread = sqrt(squares / (number - 1))
        key = f"{record.phase} {record.name}"
        if abs(value - mean) <= min(max(_SPREADS * spread, quantity.least), max(_FAR * spread, quantity.small)):
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
                f"In phase {record.phase} the {quantity.text} of the input is {_text(value, unit)}{unit}, in training "
                f"{_text(mean, unit)}{unit} (standard deviation {_text(spread, unit)}{unit}, {number:.0f} steps).",
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


def _rows(layers: Layers, records: Sequence[Record], raised: list[str], found: list[Finding]) -> None:
    """Judge which rows embeddings are asked for."""
    for (phase, layer), now in layers.items():
        if "input/row_share_in_training" not in now:
            continue
        here, there, row = (now[f"input/{name}"] for name in ("row_share", "row_share_in_training", "row"))
        key = f"{phase} row {layer}"
        if here - there < _ONE_ROW:
            if key in raised:
                raised.remove(key)
        elif key not in raised:
            raised.append(key)
            found.append(
                Finding(
                    "input-drift",
                    "warning",
                    f"In phase {phase} {here:.0%} of what {layer!r} is asked for is row {row:.0f}, in training {there:.0%}.",
                    "Is that the unknown token? Then the two phases read with different vocabularies or spellings; else look for a column that is missing and was filled.",
                    step=records[0].step,
                    module=layer,
                    phase=phase,
                    rank=records[0].rank,
                    evidence={"row": row, "value": here, "training_mean": there},
                )
            )


def _by_layer(records: Sequence[Record]) -> Layers:
    """What probes have read of each layer outside of training."""
    layers: Layers = {}
    for record in records:
        if record.source == "probe" and record.phase != "train" and isinstance(record.value, (int, float)):
            layers.setdefault((record.phase, record.module), {})[record.name] = float(record.value)
    return layers


def _columns(layers: Layers, records: Sequence[Record], raised: list[str], found: list[Finding]) -> None:
    """Judge the columns of what layers are given."""
    for (phase, layer), now in layers.items():
        if "input/columns_changed" not in now:
            continue
        changed, db = now["input/columns_changed"], now["input/column_change_db"]
        shifted, shift = now["input/columns_shifted"], now["input/column_shift"]
        whole = any(
            f"{phase} input/{name}" in raised for name in ("rms", "mean")
        )  # then all columns follow, and that is said
        off = (changed >= _MANY or db > _ONE_DB or shifted >= _MANY or shift > _ONE) and not whole
        key = f"{phase} columns {layer}"
        if not off or key in raised:
            raised[:] = [each for each in raised if off or each != key]
            continue
        raised.append(key)
        found.append(
            Finding(
                "input-drift",
                "warning",
                f"In phase {phase}, {changed:.0%} of the columns that {layer!r} is given have another spread than in training (by up to {db:.1f} dB), and "
                f"{shifted:.0%} another mean (by up to {shift:.1f} of their spreads).",
                "Compare order and scaling of the features: one function, fitted on the training data, for all phases.",
                step=max(record.step for record in records),
                module=layer,
                phase=phase,
                evidence={"columns_changed": changed, "change_db": db, "columns_shifted": shifted, "shift": shift},
            )
        )


def _modes(records: Sequence[Record], raised: list[str], found: list[Finding]) -> None:
    """Judge the mode in which a validation runs."""
    counts = {record.name: record for record in records if record.name.endswith("s_in_training")}
    norms, drops = (counts.get(f"input/{kind}_in_training") for kind in ("norms", "dropouts"))
    if norms is None or drops is None or names.phase(norms.phase) not in {"val", "test"}:
        return
    key, told = f"{norms.phase} mode", bool(norms.value or drops.value)
    if told and key not in raised:
        raised.append(key)
        batches = f"{norms.value:.0f} BatchNorm modules normalise by its own batches and take them into their running statistics"
        found.append(
            Finding(
                "validation-in-train-mode",
                "warning",
                f"The model is in train mode in phase {norms.phase}: {batches if norms.value else f'{drops.value:.0f} dropout modules drop'}.",
                "Call model.eval() before it, and model.train() after it: torch.no_grad() does neither.",
                step=norms.step,
                phase=norms.phase,
                rank=norms.rank,
                evidence={"norms": norms.value, "dropouts": drops.value},
            )
        )
    elif not told and key in raised:
        raised.remove(key)


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


def _text(value: float, unit: str) -> str:
    digits = 1 if unit == " dB" else 2
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before zero


def _welford(seen: list[Any], value: float) -> list[float]:
    """Count, mean and sum of squared deviations, updated.

    References: Welford 1962, Note on a method for calculating corrected sums of squares and products.
    """
    number, mean, squares = seen
    number += 1
    change = value - mean
    mean += change / number
    return [number, mean, squares + change * (value - mean)]
