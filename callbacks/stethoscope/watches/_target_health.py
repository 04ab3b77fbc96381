"""`TargetHealth`: targets that the outputs of a regression cannot get to."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, NamedTuple

from stethoscope._record import Finding
from stethoscope.probes import Inputs, LossInputs
from stethoscope.watches._streaks import Judging, told, train_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

TIMES, SPAN = 5, 50  # observed steps in a row, and steps that they span at least
EXACT = 1e-3  # relative: what is given is what the loss compares, up to rounding in half precision
FAR = 1e3  # rms, as of data: weights and biases begin as if it were about 1
ARRIVED = 0.5  # share of the targets' rms from which outputs are under way to them
TAILS = 6.0  # times the rms (the most that 36 values can have): few outliers make it, which neither outputs nor a standardisation would follow
RARE = 20  # observed steps in a row of zeros alone, from the start: of events that one batch in five holds, one would have come
CHANCE = 1e-6  # that so many batches of one number come in a row by themselves, by how many there were before


class _Seen(NamedTuple):
    """What a step has said."""

    module: str
    output: float
    rms: float
    low: float
    high: float
    beyond: float
    gap: float


@dataclass(frozen=True)
class TargetHealth:
    """Reports targets beyond the last activation, on another scale than the outputs, or without any content.

    **What it decides**, from outputs and targets of one shape, for five observed steps in a row that span 50 steps, and only where the loss is, to
    0.1 %, one of their usual errors (squared, absolute, smooth absolute, binary cross entropy with logits), so that they are what is trained on:

    - `activation-saturated`: the targets lie beyond what the last activation can return, by a mean square of `beyond` times their variance: that much
      of it cannot be explained, whatever the model learns.
    - `input-range`: the targets' rms is above 1000, and the outputs' less than half of it; not where few outliers make it (the largest is six times the rms).
      Or, whatever the loss is, the inputs' rms is above 1000, and the outputs' above 1000 times the targets': the scale of the input has come through.
    - `input-constant`: all targets are one number, the same in each of these steps. Of zeros alone, 20 observed steps from the start: events may be
      rare. Where targets were anything else before, so many that chance gives them once in 1e6, by the share of such batches before. An info where
      several optimizers step: one player of a game is told to say "real" each time.

    **Cost:** host only, O(1) per observed step. **Needs:** `probes.LossInputs` and `Inputs`: `step(loss=loss, outputs=..., targets=...)` with graphs.

    Args:
        beyond: share of the targets' variance.

    Examples:
        >>> from stethoscope.testing import replay, series
        >>> said = {"output/rms": 0.5, "target/rms": 1.0, "target/low": -2.0, "target/high": 2.0, "target/beyond": 0.6, "target/loss_gap": 0.0}
        >>> records = series(range(0, 300, 50), **{name: [value] * 6 for name, value in said.items()})
        >>> [finding.code for finding in replay(TargetHealth(), records)]
        ['activation-saturated']
    """

    _: KW_ONLY
    beyond: float = 0.1

    @property
    def needs(self) -> tuple[Probe, ...]:
        """Outputs, targets and the loss; how large the inputs are."""
        return (LossInputs(), Inputs())

    def init(self) -> State:
        """Nothing seen."""
        return {"held": {}, "constant": None, "in_row": 0, "seen": 0, "alike": 0, "optimizers": 1, "looked": False}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        if any(record.name == "loss/terms" for record in records):
            state = {**state, "looked": True}
        if (optimizers := told(records, "plan/optimizers", None)) is not None:
            state = {**state, "optimizers": optimizers}
        seen = _seen(records)
        if seen is None:
            return state, ()
        judging = Judging(state["held"], records[0].step, TIMES, SPAN)
        meant = seen.gap < EXACT
        if judging.model("activation-saturated", meant and seen.beyond > self.beyond):
            judging.tell(_unreachable(seen), values={"beyond": seen.beyond, "low": seen.low, "high": seen.high})
        if judging.model(
            "input-range", meant and seen.rms > FAR and seen.output < ARRIVED * seen.rms and not _tails(seen)
        ):
            judging.tell(_far(seen), values={"targets": seen.rms, "outputs": seen.output})
        inputs = train_values(records, "input/rms")["input/rms"].get("", 0.0)
        if judging.model("input-range/outputs", inputs > FAR and seen.output > FAR * seen.rms > 0):
            judging.tell(
                _carried_through(seen, inputs), values={"inputs": inputs, "targets": seen.rms, "outputs": seen.output}
            )
        state = _alike(state, seen)
        if judging.model("input-constant", meant and _never_else(state)):
            judging.tell(_constant(seen, state["optimizers"]), values={"value": seen.low})
        return {**state, "held": judging.held}, judging.findings


def _alike(state: State, seen: _Seen) -> State:
    """Count the batches of one number: those in a row now, and how many there were of all before these."""
    if seen.low == seen.high and state["constant"] in (None, seen.low):
        return {**state, "constant": seen.low, "in_row": state["in_row"] + 1}
    one = seen.low == seen.high
    total, alike = state["seen"] + state["in_row"], state["alike"] + state["in_row"]
    constant = seen.low if one else None
    return {**state, "constant": constant, "in_row": int(one), "seen": total + (not one), "alike": alike}


def _never_else(state: State) -> bool:
    """Whether there are more batches of one number in a row than rare events leave."""
    in_row = state["in_row"]
    if not in_row:
        return False
    if not state["seen"]:
        return bool(state["constant"] != 0 or in_row >= RARE - TIMES + 1)  # which then holds for `TIMES`
    return bool(in_row * math.log((state["alike"] + 1) / (state["seen"] + 2)) < math.log(CHANCE))


def _tails(seen: _Seen) -> bool:
    return max(abs(seen.low), abs(seen.high)) > TAILS * seen.rms


def _seen(records: Sequence[Record]) -> _Seen | None:
    names = ("output/rms", "target/rms", "target/low", "target/high", "target/beyond", "target/loss_gap")
    values = train_values(records, *names)
    module = next(iter(values["target/beyond"]), None)
    if module is None or any(module not in found for found in values.values()):
        return None
    return _Seen(module, *(values[name][module] for name in names))


def _unreachable(seen: _Seen) -> Finding:
    what = repr(seen.module) if seen.module else "The last activation"
    return Finding(
        "activation-saturated",
        "warning",
        f"{what} cannot return what it should: targets lie between {seen.low:.3g} and {seen.high:.3g}, and {seen.beyond:.0%} of their variance "
        "is beyond its range.",
        "Take the activation out of the last layer, scale targets into its range, or take one whose range fits (none for targets of any size, softplus "
        "for positive ones).",
        module=seen.module,
    )


def _far(seen: _Seen) -> Finding:
    return Finding(
        "input-range",
        "warning",
        f"Targets have an rms of {seen.rms:.3g}, outputs one of {seen.output:.3g}: weights and biases begin as if both were about 1, and training is "
        "spent on the way.",
        "Standardise the targets with mean and spread of the training data (or take their logarithm), and undo it where outputs are shown; or set the "
        "last bias to their mean.",
    )


def _carried_through(seen: _Seen, inputs: float) -> Finding:
    return Finding(
        "input-range",
        "warning",
        f"Inputs have an rms of {inputs:.3g}, outputs one of {seen.output:.3g}, and targets one of {seen.rms:.3g}: what goes in is on another scale than what should "
        "come out.",
        "Read both in the same way: int16 samples and bytes become floats by dividing them by 32768 and 255. A mask or a residual path hands the scale on.",
    )


def _constant(seen: _Seen, optimizers: float) -> Finding:
    return Finding(
        "input-constant",
        "info" if optimizers > 1 else "warning",
        f"All targets of these steps are {seen.low:.6g}: there is nothing to learn but this number.",
        "Print the targets of one batch: a column that is missing and was filled, a file that could not be read, a cast to whole numbers.",
    )
