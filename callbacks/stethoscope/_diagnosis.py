"""Relates findings with one cause: a table of rules, and the fold that applies it.

A new rule is one row of `RULES`. A row either points from findings to a code that explains them, or adds that code as a
finding of its own once everything it is `drawn_from` was seen and the numbers agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import State
    from stethoscope._record import Record

CLEAR_DB = 3.0  # margin of an assignment that is beyond doubt
UNCLEAR_DB = 1.0  # margin at which assignments count as ties
APART = 0.9  # |cos| below which outputs are apart
ALIKE = 0.95  # |cos| above which they are one
LARGE = 50.0  # rms of a column of the data: weights begin as if it were 1, so the first steps are 2500 times too large
HELD = 0.5  # share of the parameters above which the optimizer is this model's
MEMORY = 1000  # steps, or half the run, for which a finding is taken to last
KEEP = 0.8  # of the running means of the numbers below

NUMBERS = (
    "separation/margin_db",
    "separation/out_cos",
    "separation/ref_cos",
    "gradient/norm",
    "optimizer/held_fraction",
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
    return now.get("gradient/norm", 0.0) > 0 and now.get("lr", 1.0) > 0 and not held


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
BLOWN_UP = (*NOT_FINITE, "output-nonfinite", "loss-diverged", "loss-spike", "weight-norm-drift")
SPOILED = (
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
NO_SIGNAL = ("gradient-vanishing", "gradient-zero", "gradient-imbalance", "feature-constant", "prediction-collapse")

RULES: tuple[Rule, ...] = (
    # What the loss is made of: no other number of the run means what it should.
    Rule(
        code="loss-input-mismatch",
        explains=("activation-saturated", *NO_SIGNAL, "update-ratio-low", "loss-diverged", "loss-plateau"),
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
            "loss-plateau",
        ),
    ),
    # What the data is: layers, gradients and loss follow from it.
    Rule(
        code="input-range",
        explains=(
            *SPOILED,
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
        explains=(
            "feature-constant",
            "dead-units",
            "norm-input-variance",
            *NO_SIGNAL,
            "loss-plateau",
            "input-duplicate",
        ),
    ),
    Rule(
        code="input-duplicate",
        explains=(
            "feature-constant",
            "prediction-collapse",
            "class-imbalance",
            "overfit",
            "overtraining",
            "loss-plateau",
        ),
    ),
    Rule(code="gradient-accumulation", explains=("update-ratio-high", "gradient-exploding", *BLOWN_UP, "loss-plateau")),
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
            "loss-plateau",
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
        explains=("activation-vanishing", *NO_SIGNAL, *NOT_FINITE, "loss-diverged", "loss-plateau"),
    ),
    # Where the signal is lost.
    Rule(code="activation-saturated", explains=(*NO_SIGNAL, "update-ratio-low", "loss-plateau")),
    Rule(code="dead-units", explains=("activation-vanishing", "norm-input-variance", *NO_SIGNAL, "loss-plateau")),
    Rule(code="activation-vanishing", explains=("norm-input-variance", *NO_SIGNAL, "update-ratio-low", "loss-plateau")),
    Rule(
        code="gradient-vanishing",
        explains=(
            "feature-constant",
            "gradient-zero",
            "update-ratio-low",
            "parameter-unchanged",
            "prediction-collapse",
            "loss-plateau",
        ),
    ),
    Rule(code="feature-constant", explains=("prediction-collapse", "gradient-zero", "loss-plateau")),
    Rule(code="units-symmetric", explains=("loss-plateau", "stalled-from-start")),
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
    # Why a loss does not move, from the most specific reason to the least.
    Rule(
        code="gradient-zero",
        explains=("module-unused", "update-ratio-low", "parameter-unchanged", "loss-plateau", "stalled-from-start"),
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
        explains=("update-ratio-low", "prediction-collapse", "loss-plateau", "stalled-from-start"),
    ),
    Rule(
        code="update-ratio-low",
        explains=("parameter-unchanged", "prediction-collapse", "loss-plateau", "stalled-from-start"),
    ),
    Rule(
        code="optimizer-owns-others",
        explains=("loss-plateau", "stalled-from-start", "parameter-unchanged"),
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
            "loss-plateau",
            "stalled-from-start",
        ),
    ),
    Rule(code="output-silent", explains=("loss-plateau", "loss-at-80-db", "assignment-ambiguous")),
    Rule(code="references-alike", explains=("loss-plateau", "output-collapse", "assignment-ambiguous")),
    Rule(code="stalled-from-start", explains=("loss-plateau", "assignment-ambiguous")),
    Rule(
        code="stalled-assignment",
        explains=("loss-plateau", "output-collapse", "assignment-ambiguous"),
        drawn_from=("loss-plateau", "output-collapse"),
        holds=_ambiguous,
        says=_assignment,
    ),
    Rule(code="output-collapse", explains=("loss-plateau", "assignment-ambiguous")),
    Rule(code="input-drift", explains=("overfit", "overtraining")),
    Rule(code="class-imbalance", explains=("prediction-collapse", "overfit", "overtraining", "loss-plateau")),
    Rule(code="loss-diverged", explains=("loss-plateau", "loss-spike")),
    Rule(
        code="stalled-optimisation",
        explains=("loss-plateau",),
        drawn_from=("loss-plateau",),
        holds=_clear,
        says=_optimisation,
    ),
)


@dataclass(frozen=True)
class Relate:
    """Sets `cause` on findings that another one explains, and adds the one that explains several.

    A finding is taken to last for 1000 steps or half of the run, whichever is more. Phases are kept apart. A finding
    that was delivered before its cause was known stays as it is, and nothing is explained by what was found at a later step:
    what other ranks have found arrives late. Host only; memory is one number per code and phase.

    Examples:
        >>> flat = Finding("loss-plateau", "warning", "Flat.", "", step=500)
        >>> silent = Finding("output-silent", "error", "Silent.", "", step=500)
        >>> relate = Relate()
        >>> [(finding.code, finding.cause) for finding in relate.update(relate.init(), (), (flat, silent))[1]]
        [('output-silent', ''), ('loss-plateau', 'output-silent')]
    """

    rules: tuple[Rule, ...] = RULES

    def init(self) -> State:
        """Nothing known."""
        return {"numbers": {}, "seen": {}}

    def update(
        self, state: State, records: Sequence[Record], findings: Sequence[Finding]
    ) -> tuple[State, Sequence[Finding]]:
        """Take in one delivery; return what to deliver: the same findings, with causes, and those that were added."""
        state = {**state, "numbers": _follow(state["numbers"], records)}
        if not findings:
            return state, findings
        out: list[Finding] = []
        seen = state["seen"]
        for phase in dict.fromkeys(finding.phase for finding in findings):
            of_phase = [finding for finding in findings if finding.phase == phase]
            step = max((finding.step or 0) for finding in of_phase)
            known = {code: [at, severity] for code, (at, severity) in seen.get(phase, {}).items() if _lasts(at, step)}
            known |= {finding.code: [finding.step or 0, finding.severity] for finding in of_phase}
            fresh = {finding.code for finding in of_phase}
            added = self._draw(known, fresh, _of(state["numbers"], phase), step, phase)
            drawn = {finding.code for finding in added}
            known |= {finding.code: [step, finding.severity] for finding in added}
            told = [self._explain(finding, known, fresh, drawn) for finding in [*of_phase, *added]]
            # the cause first: watches do not know of each other, and conclude in the order in which they were given
            out += sorted(told, key=lambda finding: _depth(finding, told))
            seen = {**seen, phase: known}
        return {**state, "seen": seen}, out

    def _draw(
        self, known: Mapping[str, list[Any]], fresh: set[str], now: Numbers, step: int, phase: str
    ) -> list[Finding]:
        """Add at most one finding: the first rule all of whose premises were seen, one of them just now."""
        for rule in self.rules:
            told = rule.code in known or any(known.get(code) for code in self._above(rule))
            serious = all(known.get(code, [0, "info"])[1] != "info" for code in rule.drawn_from)
            if rule.drawn_from and fresh & set(rule.drawn_from) and serious and not told and rule.holds(now):
                message, advice = rule.says(now)
                evidence = {"drawn_from": list(rule.drawn_from), **now}
                return [Finding(rule.code, "warning", message, advice, step, phase=phase, evidence=evidence)]
        return []

    def _above(self, rule: Rule) -> list[str]:
        """Causes in earlier rows that explain all that this one is drawn from: then there is nothing to add."""
        rows = self.rules[: self.rules.index(rule)]
        return [row.code for row in rows if set(rule.drawn_from) <= set(row.explains)]

    def _explain(self, finding: Finding, known: Mapping[str, list[Any]], fresh: set[str], drawn: set[str]) -> Finding:
        if finding.cause:
            return finding
        row = {rule.code: i for i, rule in reversed(list(enumerate(self.rules))) if not rule.by_guard}
        now = finding.step
        for i, rule in enumerate(self.rules):
            if finding.code not in rule.explains or rule.code not in known:
                continue
            at: int | None = now if rule.code in drawn else known[rule.code][0]
            later = now is not None and at is not None and at > now
            # of two that explain each other, in one step the upper row is the cause
            mutual = at == now and i > row.get(finding.code, i)
            elsewhere = rule.by_guard and (at != now or rule.code in fresh)
            if not (later or mutual or elsewhere):
                return replace(finding, cause=rule.code)
        return finding


def _depth(finding: Finding, told: Sequence[Finding]) -> int:
    """How many of the findings told with it lie between this one and what began."""
    causes, depth = {each.code: each.cause for each in told}, 0
    while finding.cause in causes and depth < len(causes):
        finding, depth = replace(finding, cause=causes[finding.cause]), depth + 1
    return depth


def _lasts(at: int, step: int) -> bool:
    return step - at <= max(MEMORY, step / 2)


def _follow(numbers: Mapping[str, float], records: Sequence[Record]) -> Mapping[str, float]:
    fresh = {}
    for record in records:
        value = record.value
        if record.name in NUMBERS and not record.module and isinstance(value, (int, float)) and math.isfinite(value):
            key = f"{record.phase}:{record.name}"
            before = numbers.get(key, value)
            fresh[key] = float(value) if record.name == "lr" else KEEP * before + (1 - KEEP) * value
    return {**numbers, **fresh} if fresh else numbers


def _of(numbers: Mapping[str, float], phase: str) -> Numbers:
    """The numbers of a phase; the learning rate and gradients are known from training."""
    train = {
        name: numbers[f"train:{name}"]
        for name in ("lr", "gradient/norm", "optimizer/held_fraction")
        if f"train:{name}" in numbers
    }
    prefix = f"{phase}:"
    return train | {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}
