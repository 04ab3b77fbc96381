"""Whether what a model trains on is fit for training: copies, and numbers on another scale than the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.probes import Inputs
from stethoscope.watches._streaks import Judging, listing, train_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

REPEATED = 0.5
"""Share of items that equal an earlier one: half of the batch teaches nothing."""
RETURNED = 0.5
"""Share of these copies that the batch before had as well, from which the data has few distinct rows: that is what it is made of."""
APART = 30.0
"""Decibels: two of three items then lie within a range of a million to one in power, and a third beyond it. Speech from whisper to shout spans about 40 dB."""
FAR = 1e3
"""rms of a column that is far beyond what features have: bytes end at 255, a 1024-point STFT of a full-scale tone at 256."""


@dataclass(frozen=True)
class InputHealth:
    """Looks at the batches that a model is trained on.

    **What it decides**, where it holds for three observed training steps in a row:
    `input-duplicate` when at least half of the items equal an earlier one of the same batch, and either all of them are alike or most
    of these copies were not in the batch before (data with few distinct rows, such as discrete states, has the same ones again
    and again); or when an embedding is given one and the same sequence for all items, step after step. `input-range` when the levels of the items of a
    batch have a standard deviation above 30 dB, or when a column (feature, channel) of the data that a trained layer is given has an rms above 1000, see
    `Inputs`. Above 50 it is named only as the cause of other findings: that is no fault by itself.
    **Cost:** host, O(layers that are given data).   **Needs:** `Inputs`.

    Examples:
        >>> from stethoscope.testing import replay, series
        >>> records = series(range(0, 150, 50), **{"input/repeated": [0.75] * 3, "input/returned": [0.0] * 3})
        >>> [finding.code for finding in replay(InputHealth(), records)]
        ['input-duplicate']
    """

    @property
    def needs(self) -> tuple[Probe, ...]:
        """The model's inputs."""
        return (Inputs(),)

    def init(self) -> State:
        """Nothing seen."""
        return {"held": {}, "seen": False, "items_db": None}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        values = train_values(
            records, "input/repeated", "input/returned", "input/column_rms", "input/items_db", "input/alike"
        )
        if not any(record.name.startswith("input/") for record in records):
            return state, ()
        judging = Judging(state["held"], max(record.step for record in records), times=3, steps=0)
        _copies(judging, values["input/repeated"].get(""), values["input/returned"].get("", 0.0))
        now = values["input/items_db"].get("", 0.0)
        items_db = (
            now if state.get("items_db") is None else 0.8 * state["items_db"] + 0.2 * now
        )  # of few items it is rough
        _levels(judging, items_db)
        _alike(judging, values["input/alike"])
        layers = values["input/column_rms"]
        _scale(judging, layers if len(layers) == 1 else {name: value for name, value in layers.items() if name})
        return {"held": judging.held, "seen": True, "items_db": items_db}, judging.findings


def _copies(judging: Judging, repeated: float | None, returned: float) -> None:
    if repeated is None:
        return
    alike = repeated == 1
    if not judging.model("input-duplicate", repeated >= REPEATED and (alike or returned < RETURNED)):
        return
    said = (
        "All items of the batch are alike"
        if alike
        else f"{repeated:.0%} of the items are copies of others in their batch"
    )
    judging.tell(
        Finding(
            "input-duplicate",
            "warning",
            f"{said}, in three observed steps in a row.",
            "Print the indices and a few items of one batch. Workers that share a random state draw the same (np.random in a data set: "
            "seed it in worker_init_fn); a data set or a sampler may ignore its index; an expanded tensor holds one item many times.",
        ),
        values={"repeated": repeated, "returned": returned},
    )


def _levels(judging: Judging, spread: float) -> None:
    if judging.model("input-range/items", spread > APART):
        judging.tell(
            Finding(
                "input-range",
                "warning",
                f"The levels of the items of a batch differ by {spread:.0f} dB (standard deviation): the loudest are the whole batch, or the quietest nothing.",
                "Look at how items are scaled: a gain in dB is 10 ** (dB / 20), int16 and floats in one list differ by 90 dB. Or normalise each item.",
            ),
            values={"items_db": spread},
        )


def _alike(judging: Judging, layers: dict[str, float]) -> None:
    news = judging.hold("input-duplicate/sequence", [name for name, flag in layers.items() if flag == 1], layers)
    if news:
        judging.tell(
            Finding(
                "input-duplicate",
                "warning",
                f"All items of the batch are the same sequence for {listing(news)}, and it is that of the steps before.",
                "Print what the data set returns for this input: a column that is missing and was filled with a default, an empty text, or a prompt that "
                "hides the item.",
                module=news[0],
            ),
            news,
            layers,
        )


def _scale(judging: Judging, layers: dict[str, float]) -> None:
    news = judging.hold("input-range", [name for name, value in layers.items() if value > FAR], layers)
    if not news:
        return
    worst = max(news, key=lambda name: layers[name])
    judging.tell(
        Finding(
            "input-range",
            "warning",
            f"A column of what {listing(news)} is given has an rms of {layers[worst]:.3g}; weights begin as if it were about 1.",
            "Standardise it with the mean and spread of the training data (pictures / 255, int16 / 32768, times as differences or in days), "
            "or put a BatchNorm first. One such column drowns the others.",
            module=worst,
        ),
        news,
        layers,
    )
