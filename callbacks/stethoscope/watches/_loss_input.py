"""`LossInput`: losses that are given something else than what they are made for."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, NamedTuple

from stethoscope._record import Finding
from stethoscope.probes import LossInputs
from stethoscope.watches._streaks import Judging, train_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record, Severity

LAYER, SOFTMAX, LOG_SOFTMAX, SIGMOID, RELU, TANH, OTHER_AXIS = range(1, 8)
"""What `loss/<kind>_input` says, see `probes.LossInputs`."""


EXACT = 1e-3  # relative gap up to which a loss is what outputs and targets make; smoothed labels lie within [0, 1]


class _Kind(NamedTuple):
    """A kind of loss: its name, what it takes, what is no such thing, and what to do then."""

    name: str
    takes: str
    wrong: tuple[int, ...]
    advice: str


_WITHOUT = (
    "Take the activation out of the model's last layer, and apply it where probabilities are shown or decided on."
)
_LOGARITHMS = "Give it log_softmax over the axis of the classes."

KINDS = {
    "loss/cross_entropy_input": _Kind(
        "cross entropy", "logits, and makes the softmax itself", (SOFTMAX, LOG_SOFTMAX, SIGMOID, RELU, TANH), _WITHOUT
    ),
    "loss/bce_input": _Kind(
        "binary cross entropy with logits",
        "logits, and makes the sigmoid itself",
        (SOFTMAX, LOG_SOFTMAX, SIGMOID, RELU, TANH),
        _WITHOUT,
    ),
    "loss/nll_input": _Kind(
        "nll_loss", "log-probabilities over the classes", (LAYER, SOFTMAX, SIGMOID, RELU, TANH, OTHER_AXIS), _LOGARITHMS
    ),
    "loss/ctc_input": _Kind(
        "ctc_loss", "log-probabilities over the symbols", (LAYER, SOFTMAX, SIGMOID, RELU, TANH, OTHER_AXIS), _LOGARITHMS
    ),
}

GIVEN = {
    LAYER: ("a layer's own output", "no probability is below 1 there, so that the loss has no lowest value"),
    SOFTMAX: ("what a softmax has returned", "numbers within [0, 1] hardly differ for it, and little gradient is left"),
    LOG_SOFTMAX: ("what a log-softmax has returned", "a second one changes nothing"),
    SIGMOID: ("what a sigmoid has returned", "numbers within [0, 1] hardly differ for it, and little gradient is left"),
    RELU: ("what a ReLU has returned", "no score can be negative, and a unit below zero gets no gradient"),
    TANH: ("what a tanh has returned", "scores within [-1, 1] cannot say that anything is sure"),
    OTHER_AXIS: ("a log-softmax over another axis", "items or frames are normalised in place of classes"),
}


@dataclass(frozen=True)
class LossInput:
    """Reports a softmax or sigmoid that is applied twice, once in the model and once in the loss, and log losses without a logarithm.

    **What it decides**, of each loss given to `step` with its graph (`loss`, not `loss.item()`), at the first observed step:

    - `loss-input-mismatch`: `cross_entropy` or `binary_cross_entropy_with_logits` is given what a softmax, sigmoid, ReLU or tanh has
      returned right before; `nll_loss` or `ctc_loss` is given a layer's own output or one of these, or a log-softmax over another axis
      than that of the classes. Info for a log-softmax before a cross entropy, which is harmless.

      Or each output of a batch is compared with each target, (items, 1) against (items,); or `binary_cross_entropy_with_logits` has targets
      below 0 or above 1, in three observed steps in a row.

    Reshaping, masking and casts in between do not hide it; anything else (a scale, a sum) does. What models do inside, such as the
    softmax of an attention, does not count.

    **Cost:** host only, nothing to speak of. **Needs:** `probes.LossInputs`.

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> replay(LossInput(), [Record("loss/cross_entropy_input", 2.0, 0, "head.1")])[0].code
        'loss-input-mismatch'

    References: Humbatova et al. 2020 (wrong loss for the last layer); Schoop et al. 2021 (UMLAUT: softmax and logits).
    """

    _: KW_ONLY

    @property
    def needs(self) -> tuple[Probe, ...]:
        """What losses are given."""
        return (LossInputs(),)

    def init(self) -> State:
        """Nothing seen."""
        return {"held": {}, "looked": False}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        terms = [r for r in records if r.source == "probe" and r.phase == "train" and r.name.startswith("loss/")]
        if not terms:
            return state, ()
        judging = Judging(state["held"], records[0].step, times=1, steps=0)
        for name, kind in KINDS.items():
            forms = {r.module: int(r.value) for r in terms if r.name == name and isinstance(r.value, float)}
            hits = [module for module, form in forms.items() if form in kind.wrong]
            news = judging.hold(name, hits, forms)
            if news:
                _tell(judging, kind, news[0], forms[news[0]])
        _crossed(judging, [r.value for r in terms if r.name == "loss/crossed" and isinstance(r.value, float)])
        _no_probabilities(judging, records)
        return {"held": judging.held, "looked": True}, judging.findings


def _crossed(judging: Judging, sizes: Sequence[float]) -> None:
    if judging.model("crossed", bool(sizes)):
        items = int(max(sizes))
        judging.tell(
            Finding(
                "loss-input-mismatch",
                "warning",
                f"The loss compares each of {items} outputs with each of {items} targets: shapes ({items}, 1) and ({items},) make ({items}, {items}), "
                "and the best that a model can do is to return the mean.",
                "Give both the same shape: outputs.squeeze(-1), or targets.unsqueeze(-1).",
            ),
            values={"items": items},
        )


def _no_probabilities(judging: Judging, records: Sequence[Record]) -> None:
    names = ("loss/bce_input", "target/low", "target/high", "target/loss_gap")
    terms, *values = train_values(records, *names).values()
    numbers = [next(iter(found.values()), None) for found in values]
    low, high, gap = (math.nan if number is None else number for number in numbers)
    outside = bool(terms) and gap < EXACT and (low < -EXACT or high > 1 + EXACT)
    if judging.hold("no-probabilities", [""] if outside else [], [""], times=3):
        judging.tell(
            Finding(
                "loss-input-mismatch",
                "warning",
                f"binary cross entropy has targets between {low:.3g} and {high:.3g}, but takes probabilities: the loss has no lowest value.",
                "Make labels 0 and 1 (labels of 1 and 2, or -1 and 1, come from files like that), or take the loss that they were made for.",
            ),
            values={"low": low, "high": high},
        )


def _tell(judging: Judging, kind: _Kind, module: str, form: int) -> None:
    given, means = GIVEN[form]
    severity: Severity = "info" if form == LOG_SOFTMAX else "warning"
    judging.tell(
        Finding(
            "loss-input-mismatch",
            severity,
            f"{kind.name} is given {given}{f' ({module!r})' if module else ''}, but takes {kind.takes}: {means}.",
            kind.advice,
            module=module,
        ),
        values={"form": form},
    )
