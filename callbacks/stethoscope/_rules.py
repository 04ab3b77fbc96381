"""What explains what: the table of the diagnosis.

A new rule is one row of `RULES`. A row either points from findings to a code that explains them, or adds that code as a
finding of its own once everything it is `drawn_from` was seen and the numbers agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

CLEAR_DB = 3.0  # margin of an assignment that is beyond doubt
UNCLEAR_DB = 1.0  # margin at which assignments count as ties
APART = 0.9  # |cos| below which outputs are apart
ALIKE = 0.95  # |cos| above which they are one
LARGE = 50.0  # rms of a column of the data: weights begin as if it were 1, so the first steps are 2500 times too large
HELD = 0.5  # share of the parameters above which the optimizer is this model's

NUMBERS = (
    "separation/margin_db",
    "separation/out_cos",
    "separation/ref_cos",
    "gradient/norm",
    "optimizer/held_fraction",
    "optimizer/steps",
    "lr",
    "input/column_rms",
)
"""Records of the whole model whose running means the rules may look at."""

Numbers: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        code: what explains.
        explains: codes that get it as their `cause`.
        drawn_from: codes of warnings or errors that must have been seen before `code` is added as a finding; empty where
            `code` is found by a watch or an audit.
        holds: what the numbers must say, too.
        says: message and advice of the finding that is added.
        by_guard: it explains what comes later of its own step alone: the guard speaks before its step ends and undoes it, so that
            other steps have reasons of their own.
    """

    code: str
    explains: tuple[str, ...]
    drawn_from: tuple[str, ...] = ()
    holds: Callable[[Numbers], bool] = lambda _: True
    says: Callable[[Numbers], tuple[str, str]] = lambda _: ("", "")
    by_guard: bool = False


def _clear(now: Numbers) -> bool:
    apart = now.get("separation/out_cos", 0.0) < APART
    return apart and now.get("separation/margin_db", -math.inf) > CLEAR_DB


def _ambiguous(now: Numbers) -> bool:
    alike = now.get("separation/out_cos", 0.0) > ALIKE
    return alike and now.get("separation/margin_db", math.inf) < UNCLEAR_DB


def _gradients_flow(now: Numbers) -> bool:
    held = now.get("optimizer/held_fraction", 0.0) > HELD
    steps = now.get("optimizer/steps", 1.0) > 0 and now.get("lr", 1.0) > 0
    return now.get("gradient/norm", 0.0) > 0 and steps and not held


def _cosines(now: Numbers) -> str:
    parts = [f"output |cos| {now.get('separation/out_cos', math.nan):.2f}"]
    if "separation/ref_cos" in now:
        parts.append(f"reference |cos| {now['separation/ref_cos']:.2f}")
    parts.append(f"margin {now.get('separation/margin_db', math.nan):.1f} dB")
    return ", ".join(parts)


def _optimisation(now: Numbers) -> tuple[str, str]:
    rate = f" The learning rate is {now['lr']:.2g}." if "lr" in now else ""
    message = (
        f"The loss is flat although the outputs are apart and the assignment is clear ({_cosines(now)}): this is the "
        f"optimisation or the capacity of the model, not the separation.{rate}"
    )
    advice = (
        "Look at the learning rate first (a scheduler that has cut it too early?), then at gradient clipping, capacity and "
        "data; the loss wiring is fine."
    )
    return message, advice


def _assignment(now: Numbers) -> tuple[str, str]:
    message = (
        f"The loss is flat, the outputs are alike and the assignment is a tie ({_cosines(now)}): the loss does not reward "
        "telling the sources apart."
    )
    advice = (
        "Check the wiring of the loss: the minimum over permutations of the mean over sources, per item; references in one "
        "order, not shuffled; every output in the loss."
    )
    return message, advice


def _far(now: Numbers) -> bool:
    return now.get("input/column_rms", 0.0) > LARGE


def _scale(now: Numbers) -> tuple[str, str]:
    message = (
        f"The data reaches the first trained layer with a column (feature, channel) whose rms is "
        f"{now.get('input/column_rms', math.nan):.3g}; weights begin as if it were about 1, and this training has not coped."
    )
    advice = "Standardise it with the mean and spread of the training data (pictures / 255), or put a BatchNorm first."
    return message, advice


def _owner(now: Numbers) -> tuple[str, str]:
    message = (
        f"Nothing learns although gradients flow (norm {now.get('gradient/norm', math.nan):.3g}) and the learning rate is "
        f"{now.get('lr', math.nan):.2g}: the optimizer owns other parameters than this model's."
    )
    advice = (
        "Build the optimizer after moving, wrapping or replacing modules, from this model's parameters(): "
        "audits.training(optimizer, model) lists what is missing."
    )
    return message, advice


NOT_FINITE = tuple(f"nonfinite-{what}" for what in ("gradient", "optimizer", "parameter", "activation", "loss"))
STUCK = ("loss-plateau", "stalled-optimisation")
BLOWN_UP = (*NOT_FINITE, "output-nonfinite", "loss-diverged", "loss-spike", "weight-norm-drift")
SPOILED = (
    "poor-initialisation",
    "dead-units",
    "activation-exploding",
    "activation-saturated",
    "gradient-exploding",
    "gradient-vanishing",
    "gradient-clipping",
    "feature-constant",
    "prediction-collapse",
    "loss-diverged",
    "loss-plateau",
)
"""What data on another scale than the weights does to a training."""
NO_SIGNAL = (
    "gradient-vanishing",
    "gradient-zero",
    "gradient-imbalance",
    "feature-constant",
    "prediction-collapse",
    "class-imbalance",
)

RULES: tuple[Rule, ...] = (
    # What the loss is made of: no other number of the run means what it should.
    Rule(
        code="loss-input-mismatch",
        explains=("activation-saturated", *NO_SIGNAL, "update-ratio-low", "loss-diverged", *STUCK, "overfit"),
    ),
    # What a run begins with, then steps that are too large: they spoil what is measured after them.
    Rule(
        code="poor-initialisation",
        explains=(
            "units-symmetric",
            "update-ratio-high",
            "update-ratio-low",
            "activation-exploding",
            "activation-vanishing",
            "activation-saturated",
            "norm-input-variance",
            "dead-units",
            "gradient-exploding",
            *NO_SIGNAL,
            *BLOWN_UP,
            *STUCK,
        ),
    ),
    # What is set so that hardly anything comes through.
    Rule(
        code="dropout-high",
        explains=("dead-units", "activation-saturated", *NO_SIGNAL, "output-constant", "loss-spike", *STUCK),
    ),
    # What the data is: layers, gradients and loss follow from it.
    Rule(
        code="input-range",
        explains=(
            *SPOILED,
            "stalled-optimisation",
            "gradient-zero",
            "gradient-imbalance",
            "update-ratio-high",
            "update-ratio-low",
            "norm-input-variance",
            "loss-spike",
            "dtype-headroom",
            "weight-norm-drift",
        ),
    ),
    *(Rule(code="input-range", explains=(), drawn_from=(symptom,), holds=_far, says=_scale) for symptom in SPOILED),
    Rule(
        code="input-constant",
        explains=("feature-constant", "dead-units", "norm-input-variance", *NO_SIGNAL, *STUCK, "input-duplicate"),
    ),
    Rule(
        code="input-duplicate",
        explains=("feature-constant", "prediction-collapse", "class-imbalance", "overfit", "overtraining", *STUCK),
    ),
    Rule(
        code="gradient-accumulation",
        explains=("update-ratio-high", "gradient-exploding", *BLOWN_UP, *STUCK),
    ),
    Rule(
        code="update-ratio-high",
        explains=(
            "activation-exploding",
            "activation-saturated",
            "norm-input-variance",
            "dead-units",
            "gradient-exploding",
            *NO_SIGNAL,
            *BLOWN_UP,
            "dtype-headroom",
            *STUCK,
        ),
    ),
    Rule(
        code="activation-exploding",
        explains=("activation-saturated", "dtype-headroom", "gradient-exploding", *BLOWN_UP),
    ),
    Rule(code="dtype-headroom", explains=BLOWN_UP),
    Rule(code="gradient-exploding", explains=("dead-units", "activation-saturated", *BLOWN_UP)),
    Rule(
        code="weight-norm-drift",
        explains=("activation-vanishing", *NO_SIGNAL, *NOT_FINITE, "loss-diverged", *STUCK),
    ),
    # Where the signal is lost.
    Rule(code="activation-saturated", explains=(*NO_SIGNAL, "update-ratio-low", *STUCK)),
    Rule(
        code="dead-units",
        explains=("activation-vanishing", "norm-input-variance", *NO_SIGNAL, *STUCK),
    ),
    Rule(
        code="activation-vanishing",
        explains=("norm-input-variance", *NO_SIGNAL, "update-ratio-low", *STUCK),
    ),
    Rule(
        code="gradient-vanishing",
        explains=(
            "feature-constant",
            "gradient-zero",
            "update-ratio-low",
            "parameter-unchanged",
            "prediction-collapse",
            *STUCK,
        ),
    ),
    Rule(
        code="feature-constant",
        explains=("prediction-collapse", "gradient-zero", "gradient-vanishing", *STUCK),
    ),
    Rule(code="units-symmetric", explains=(*STUCK, "stalled-from-start")),
    # What is not finite spoils everything that is measured after it. The guard's audit knows more than flags.
    Rule(
        code="nonfinite-optimizer",
        explains=("nonfinite-parameter", "nonfinite-activation", "nonfinite-loss", "output-nonfinite"),
        by_guard=True,
    ),
    Rule(
        code="nonfinite-buffer", explains=("nonfinite-activation", "nonfinite-loss", "output-nonfinite"), by_guard=True
    ),
    Rule(
        code="nonfinite-input", explains=("nonfinite-activation", "nonfinite-loss", "output-nonfinite"), by_guard=True
    ),
    Rule(
        code="nonfinite-parameter",
        explains=(
            "nonfinite-activation",
            "nonfinite-loss",
            "nonfinite-gradient",
            "output-nonfinite",
            "loss-diverged",
            "prediction-collapse",
        ),
    ),
    Rule(
        code="nonfinite-activation",
        explains=("nonfinite-loss", "nonfinite-gradient", "output-nonfinite", "loss-diverged", "prediction-collapse"),
    ),
    Rule(code="nonfinite-gradient", explains=("nonfinite-optimizer", "nonfinite-parameter", "loss-diverged")),
    Rule(code="nonfinite-loss", explains=("nonfinite-gradient", "loss-diverged", "prediction-collapse")),
    Rule(code="loss-sign", explains=("loss-diverged", "prediction-collapse", *STUCK)),
    # Why a loss does not move, from the most specific reason to the least.
    Rule(
        code="gradient-zero",
        explains=("module-unused", "update-ratio-low", "parameter-unchanged", *STUCK, "stalled-from-start"),
    ),
    Rule(
        code="scheduler-ends-early",
        explains=(
            "update-ratio-low",
            "parameter-unchanged",
            "loss-plateau",
            "stalled-from-start",
            "stalled-optimisation",
        ),
    ),
    Rule(
        code="gradient-clipping",
        explains=("update-ratio-low", "prediction-collapse", *STUCK, "stalled-from-start"),
    ),
    Rule(
        code="update-ratio-low",
        explains=("parameter-unchanged", "prediction-collapse", *STUCK, "stalled-from-start"),
    ),
    Rule(
        code="optimizer-owns-others",
        explains=(*STUCK, "stalled-from-start", "parameter-unchanged"),
        drawn_from=("loss-plateau", "parameter-unchanged"),
        holds=_gradients_flow,
        says=_owner,
    ),
    Rule(
        code="batch-order",
        explains=(
            "references-alike",
            "output-silent",
            "output-collapse",
            "assignment-ambiguous",
            *STUCK,
            "stalled-from-start",
        ),
    ),
    Rule(code="output-silent", explains=(*STUCK, "loss-at-80-db", "assignment-ambiguous")),
    Rule(
        code="references-alike",
        explains=(*STUCK, "output-collapse", "assignment-ambiguous"),
    ),
    Rule(code="stalled-from-start", explains=(*STUCK, "assignment-ambiguous")),
    Rule(
        code="stalled-assignment",
        explains=(*STUCK, "output-collapse", "assignment-ambiguous"),
        drawn_from=("loss-plateau", "output-collapse"),
        holds=_ambiguous,
        says=_assignment,
    ),
    Rule(code="output-collapse", explains=(*STUCK, "assignment-ambiguous")),
    Rule(code="input-drift", explains=("overfit", "overtraining")),
    Rule(code="validation-in-train-mode", explains=("overfit", "overtraining", "metric-phase-mismatch")),
    # in a batch of one class, units of the others are zero for every item
    Rule(
        code="class-imbalance",
        explains=("dead-units", "prediction-collapse", "overfit", "overtraining", *STUCK),
    ),
    Rule(code="loss-diverged", explains=(*STUCK, "loss-spike")),
    Rule(
        code="stalled-optimisation",
        explains=("loss-plateau",),
        drawn_from=("loss-plateau",),
        holds=_clear,
        says=_optimisation,
    ),
)
