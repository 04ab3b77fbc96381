"""Whether what a model trains on is fit for training: copies, and numbers on another scale than the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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
FEW = 32
"""Different items: what is trained on so few is learnt by heart, whatever the model."""
ROUNDS = 4.0
"""Times that each of them came, on average: then no more than 2 % of what there is has not come yet, if it is drawn at random."""
BLANK = 0.5
"""Share of items that are one and the same number: half of the batch teaches nothing."""
FAR = 1e3
"""rms of a column that is far beyond what features have: bytes end at 255, a 1024-point STFT of a full-scale tone at 256."""

WIDE = 75.0
"""rms of the data as a whole: bytes of MNIST have 85, of photographs 130; a spectrogram from -80 to 0 dB has some 50."""

VARIETY = (
    "input/items",
    "input/different",
    "input/different_in_batch",
    "input/different_elsewhere",
    "input/kept",
)


@dataclass(frozen=True)
class InputHealth:
    """Looks at the batches that a model is trained on.

    **What it decides**, where it holds for three observed training steps in a row:
    `input-duplicate` when at least half of the items equal an earlier one of the same batch, and either all of them are alike or most
    of these copies were not in the batch before (data with few distinct rows, such as discrete states, has the same ones again
    and again); or all items that were observed lately are at most 32 different ones, each four times and more, or one batch of any size that is made anew each time,
    smaller than what other phases show; or when an embedding is given one and the same sequence for all items, step after step. `input-constant` when at least half of the items are one and the same number all over. `input-range` when the levels of the items of a
    batch have a standard deviation above 30 dB, or when a column (feature, channel) of the data that a trained layer is given has an rms above 1000, or all
    of it one above 75 that no normalisation takes away, see `Inputs`. `input-dtype` when the data are float64 and no parameter is. Single columns above 50 are named only as the cause of other findings: that is no fault by itself.
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
            records,
            "input/repeated",
            "input/returned",
            "input/column_rms",
            "input/level",
            "input/items_db",
            "input/alike",
            "input/blank",
            "input/one_row",
            "input/double",
            "input/constant",
            *VARIETY,
        )
        if not any(record.name.startswith("input/") for record in records):
            return state, ()
        judging = Judging(state["held"], max(record.step for record in records), times=3, steps=0)
        _copies(judging, values["input/repeated"].get(""), values["input/returned"].get("", 0.0))
        _variety(judging, values)
        constant = values["input/constant"].get("", 0.0)  # that is InputDrift's
        _blank(judging, values["input/blank"].get("", 0.0) if constant < BLANK else 0.0)
        now = values["input/items_db"].get("", 0.0)
        items_db = (
            now if state.get("items_db") is None else 0.8 * state["items_db"] + 0.2 * now
        )  # of few items it is rough
        _levels(judging, items_db)
        _alike(judging, values["input/alike"])
        _one_row(judging, values["input/one_row"])
        _double(judging, told=bool(values["input/double"]))
        layers = values["input/column_rms"]
        _scale(judging, layers if len(layers) == 1 else {name: value for name, value in layers.items() if name})
        _whole(judging, {name: value for name, value in values["input/level"].items() if layers.get(name, 0.0) <= FAR})
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


def _variety(judging: Judging, values: dict[str, dict[str, float]]) -> None:
    """Judge how many different items there are in all."""
    seen = {source: _Variety(*(values[name].get(source, 0.0) for name in VARIETY)) for source in values["input/items"]}
    hits = [source for source, each in seen.items() if each.few or each.one_batch]
    if not judging.hold("input-duplicate/variety", hits, seen):
        return
    of = seen[hits[0]]
    said = (
        f"The last {of.items:,.0f} items of observed batches are {of.different:,.0f} different ones, again and again."
    )
    if of.elsewhere > of.different:
        said += f" Other phases have shown {of.elsewhere:,.0f} at least."
    judging.tell(
        Finding(
            "input-duplicate",
            "warning",
            said,
            "Print the indices of some batches: a generator or loader that is made anew in every step (next(iter(loader))), a list that was cut for a dry run, weights "
            "of a sampler that leave a few items.",
        ),
        values={"items": of.items, "different": of.different, "elsewhere": of.elsewhere},
    )


class _Variety(NamedTuple):
    """How many different items there are, see `Inputs`."""

    items: float
    different: float
    in_batch: float
    elsewhere: float
    kept: float

    @property
    def few(self) -> bool:
        whole = self.kept and self.elsewhere <= self.different  # what there is, as one batch
        return not whole and 0 < self.different <= FEW and self.items >= ROUNDS * self.different

    @property
    def one_batch(self) -> bool:
        """Whether one batch comes again and again: made anew each time, and nobody validates on more than there is to train on."""
        same = self.different == self.in_batch and self.items >= ROUNDS * self.different > 0
        return not self.kept and same and self.elsewhere > self.different


def _blank(judging: Judging, share: float) -> None:
    told = bool(judging.held.get("input-constant/blank", {}).get("told"))  # of few items the share is rough
    if judging.model("input-constant/blank", share >= (BLANK / 2 if told else BLANK)):
        judging.tell(
            Finding(
                "input-constant",
                "warning",
                f"{share:.0%} of the items of a batch are one and the same number all over, in three observed steps in a row.",
                "Print some of them: padding that is all that a cut has left, rows of a join that found no partner and were filled, files that could not be read.",
            ),
            values={"blank": share},
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


def _one_row(judging: Judging, layers: dict[str, float]) -> None:
    hits = [name for name, flag in layers.items() if flag == 1]
    news = judging.hold("feature-constant/row", hits, layers)
    if news:
        judging.tell(
            Finding(
                "feature-constant",
                "warning",
                f"All items have asked for one row of {listing(news)} in three observed steps in a row: what it returns is a constant.",
                "Print the numbers before they are looked up: a default for keys that are not found (text and numbers, another spelling), a column that is missing.",
                module=news[0],
            ),
            news,
            layers,
        )


def _double(judging: Judging, *, told: bool) -> None:
    if judging.model("input-dtype", told):
        judging.tell(
            Finding(
                "input-dtype",
                "warning",
                "The data arrive in float64, and no parameter of the model is: twice the memory and transfer until something converts them.",
                "Convert in the data set: torch.from_numpy(x).float(). NumPy and pandas make float64 unless told otherwise.",
            )
        )


def _scale(judging: Judging, layers: dict[str, float]) -> None:
    news = judging.hold("input-range", [name for name, value in layers.items() if FAR < value < math.inf], layers)
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


def _whole(judging: Judging, levels: dict[str, float]) -> None:
    news = judging.hold("input-range/level", [name for name, value in levels.items() if value > WIDE], levels)
    if not news:
        return
    judging.tell(
        Finding(
            "input-range",
            "warning",
            f"What {listing(news)} is given has an rms of {levels[news[0]]:.3g} all over, and no normalisation follows; weights begin as if it were about 1.",
            "Divide pictures in bytes by 255 and 16-bit samples by 32768, or standardise with the mean and spread of the training data. If the weights were trained "
            "on such data, it is right as it is.",
            module=news[0],
        ),
        news,
        levels,
    )
